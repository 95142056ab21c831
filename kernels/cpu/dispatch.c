/* Which path this processor can take, and the contract's operations as exported functions. Calls are not made from two threads
 * at once: Python holds a lock around them. */
#include "minillm_cpu.h"

#include <string.h>

extern const Kernels kernels_portable;
#if defined(MINILLM_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
extern const Kernels kernels_avx2, kernels_avx512, kernels_amx;
#endif

const Kernels *kernels = &kernels_portable;

#if defined(MINILLM_X86)

/* Bits of XCR0: what the system saves of a thread's registers. */
static uint64_t saved_state(void)
{
    uint32_t a, b, c, d;
    __cpuid(1, a, b, c, d);
    if (!(c >> 27 & 1))
        return 0;
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (uint64_t)d << 32 | a;
}

static int all(uint32_t word, uint32_t bits) { return (word & bits) == bits; }

/* Linux lends the 8 KiB of tile registers only to processes that ask (ARCH_REQ_XCOMP_PERM, feature XTILEDATA). */
static int tiles_allowed(void)
{
#if defined(__linux__)
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return 0;
#endif
}

static const Kernels *available(const char *name)
{
    uint32_t a, b1, c1, d1, b7, c7, d7, a71, b, c, d;
    if (!strcmp(name, "portable"))
        return &kernels_portable;
    if (__get_cpuid_max(0, NULL) < 7)
        return NULL;
    __cpuid(1, a, b1, c1, d1);
    __cpuid_count(7, 0, a, b7, c7, d7);
    __cpuid_count(7, 1, a71, b, c, d);
    const uint64_t state = saved_state();
    const int avx2 = all(c1, 1u << 12 | 1u << 28 | 1u << 29) && b7 >> 5 & 1 && (state & 6) == 6; /* FMA, AVX, F16C */
    const int avx512 = avx2 && all(b7, 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31) /* F, DQ, BW, VL */
                       && c7 >> 11 & 1 && a71 >> 5 & 1 && (state & 0xe6) == 0xe6; /* VNNI, BF16 */
    const int amx = avx512 && all(d7, 1u << 22 | 1u << 24) && (state & 0x60000) == 0x60000; /* AMX-BF16, AMX-TILE */
    if (!strcmp(name, "avx2"))
        return avx2 ? &kernels_avx2 : NULL;
    if (!strcmp(name, "avx512"))
        return avx512 ? &kernels_avx512 : NULL;
    if (!strcmp(name, "amx"))
        return amx && tiles_allowed() ? &kernels_amx : NULL;
    return NULL;
}

#else

static const Kernels *available(const char *name) { return strcmp(name, "portable") ? NULL : &kernels_portable; }

#endif

EXPORT int minillm_has_path(const char *name) { return available(name) != NULL; }

/* 0 if this processor cannot take it. */
EXPORT int minillm_use_path(const char *name)
{
    const Kernels *found = available(name);
    if (found)
        kernels = found;
    return found != NULL;
}

EXPORT void minillm_rms_norm(const float *x, const float *w, float eps, float *y, int64_t n, int64_t dim) { kernels->rms_norm(x, w, eps, y, n, dim); }
EXPORT void minillm_rope(const float *x, const float *cos, const float *sin, float *y, int64_t heads, int64_t n, int64_t d)
{
    kernels->rope(x, cos, sin, y, heads, n, d);
}
EXPORT void minillm_glu(float *gate, const float *up, int64_t n, float linear, float cubic) { kernels->glu(gate, up, n, linear, cubic); }
EXPORT void minillm_linear(const Product *products, int count, const float *x, int64_t n) { ATTEMPT(kernels->linear(products, count, x, n, NULL, 0)); }
EXPORT void minillm_rows(const Matrix *w, const int64_t *ids, int64_t n, float *out) { kernels->rows(w, ids, n, out); }
EXPORT void minillm_prefill_attention(const PrefillAttention *a) { ATTEMPT(kernels->prefill_attention(a)); }
EXPORT void minillm_decode_attention(const DecodeAttention *a) { ATTEMPT(kernels->decode_attention(a)); }
EXPORT void minillm_scores(const Scores *a) { ATTEMPT(kernels->scores(a)); }
EXPORT void minillm_unit_rows(const float *keys, int64_t n, int64_t d, float *unit) { kernels->unit_rows(keys, n, d, unit); }
EXPORT void minillm_merge(const Merge *m) { ATTEMPT(kernels->merge(m)); }
EXPORT void minillm_write_entries(const Entries *e) { kernels->write_entries(e); }
EXPORT void minillm_rewrite(const Rewrite *w) { ATTEMPT(kernels->rewrite(w)); }
EXPORT void minillm_clusters(const Segments *s, const float *taus, int n_taus, int64_t *counts, int64_t *seed, float *similarity)
{
    ATTEMPT(kernels->clusters(s, taus, n_taus, counts, seed, similarity));
}
EXPORT void minillm_nearest(const Nearest *a) { ATTEMPT(kernels->nearest(a)); }
EXPORT double minillm_stream(const float *x, int64_t n) { return kernels->stream(x, n); }
