/* The small matrix product under prefill: C (m, 16 p) = A (m, k) x B (k, 16 p), in the layout each path is fastest with.
 *
 * A is row-major, mm_t. B is panels of 16 columns, each [k / MM_PAIR][16][MM_PAIR] mm_t, `ldb` elements apart: pairs of bf16 that
 * lie next to one another are what both vdpbf16ps and tdpbf16ps multiply; the other paths multiply float32. k is a multiple of
 * MM_K (padded with zeros by whoever packs). C is float32. On AMX the product reads and writes whole tiles: rows of A and C up to
 * the next multiple of 16 must exist, what is written there is meaningless. */
#ifndef MINILLM_MM_H
#define MINILLM_MM_H

#include "minillm_cpu.h"
#include "simd.h"

#if defined(__AVX512BF16__)
typedef uint16_t mm_t;
#define MM_PAIR 2
#else
typedef float mm_t;
#define MM_PAIR 1
#endif
#if defined(MINILLM_AMX)
#define MM_K 32
#else
#define MM_K MM_PAIR
#endif

/* Before the first and after the last product of a task: the tile registers' configuration belongs to the thread. */
void FN(mm_begin)(void);
void FN(mm_end)(void);

/* add: C grows by the product instead of becoming it. */
void FN(mm)(const mm_t *a, int64_t lda, const mm_t *b, int64_t ldb, float *c, int64_t ldc, int64_t m, int64_t panels, int64_t k, int add);

/* One panel of B whose columns are 16 rows of k elements of `kind` (F32, F16, BF16); a NULL row is zeros. K is padded to MM_K. */
void FN(mm_pack_rows)(int kind, const void *const rows[PANEL], int64_t k, mm_t *panel);

/* The panels of B (round_up(n, MM_K), d) from its n rows; `ldb` elements between panels. bf16: whether the rows are BF16, else F32. */
void FN(mm_pack_columns)(int bf16, const void *const *rows, int64_t n, int64_t d, mm_t *panels, int64_t ldb);

/* x (k,) to mm_t, padded with zeros to MM_K. */
INLINE void mm_row(const float *x, int64_t k, float scale, mm_t *out)
{
    int64_t i = 0;
    for (; i + VW <= k; i += VW) {
#if MM_PAIR == 2
        store_bf16(out + i, load(x + i) * splat(scale));
#else
        store(out + i, load(x + i) * splat(scale));
#endif
    }
    for (; i < round_up(k, MM_K); i++) {
        float value = i < k ? x[i] * scale : 0;
#if MM_PAIR == 2
        out[i] = bf16_of(value);
#else
        out[i] = value;
#endif
    }
}

#endif
