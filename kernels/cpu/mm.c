/* The small matrix product of mm.h and the packing of its operands. */
#include "mm.h"

#if defined(MINILLM_AMX)

/* GCC 12 declares that ldtilecfg reads 8 bytes and drops stores to the other 56: the operand here is the whole array. */
void FN(mm_begin)(void)
{
    uint8_t config[64] = {1}; /* palette 1; then columns in bytes (16 words from 16), rows (16 bytes from 48) */
    for (int tile = 0; tile < 8; tile++)
        config[16 + 2 * tile] = 64, config[48 + tile] = 16;
    __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
}

void FN(mm_end)(void) { __asm__ volatile("tilerelease" ::: "memory"); }

#define LOAD(tile, p, stride) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(p), "r"((int64_t)(stride)) : "memory")
#define STORE(tile, p, stride) __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(p), "r"((int64_t)(stride)) : "memory")
#define ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile ::)
#define DOT(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)

enum { TILE = 16 * 32 }; /* elements */

INLINE void fetch(const mm_t *p)
{
    for (int line = 0; line < 16; line++)
        _mm_prefetch((const char *)p + 64 * line, _MM_HINT_T0);
}

/* C of 1 or 2 tiles by 1 or 2 tiles: tiles 0..3 are C, 4 and 5 A, 6 and 7 B. A is fetched two steps ahead into the L1 cache, past its
 * end the next rows. */
INLINE void tiles(const mm_t *a, const mm_t *b, int64_t ldb, float *c, int64_t ldc, int64_t k, int add, const int two_rows, const int two_columns)
{
    float *c2 = c + 16 * ldc;
    if (add) {
        LOAD(0, c, 4 * ldc);
        if (two_columns) LOAD(1, c + 16, 4 * ldc);
        if (two_rows) LOAD(2, c2, 4 * ldc);
        if (two_rows && two_columns) LOAD(3, c2 + 16, 4 * ldc);
    } else {
        ZERO(0);
        if (two_columns) ZERO(1);
        if (two_rows) ZERO(2);
        if (two_rows && two_columns) ZERO(3);
    }
    for (int64_t i = 0; i < k; i += MM_K, a += 2 * TILE, b += TILE) {
        fetch(a + 4 * TILE);
        LOAD(6, b, 64);
        LOAD(4, a, 64);
        DOT(0, 4, 6);
        if (two_rows) LOAD(5, a + TILE, 64);
        fetch(a + 5 * TILE);
        if (two_rows) DOT(2, 5, 6);
        if (two_columns) LOAD(7, b + ldb, 64);
        if (two_columns) DOT(1, 4, 7);
        if (two_rows && two_columns) DOT(3, 5, 7);
    }
    STORE(0, c, 4 * ldc);
    if (two_columns) STORE(1, c + 16, 4 * ldc);
    if (two_rows) STORE(2, c2, 4 * ldc);
    if (two_rows && two_columns) STORE(3, c2 + 16, 4 * ldc);
}

void FN(mm)(const mm_t *a, int64_t lda, const mm_t *b, int64_t ldb, float *c, int64_t ldc, int64_t m, int64_t panels, int64_t k, int add)
{
    for (int64_t p = 0; p < panels; p += 2)
        for (int64_t i = 0; i < m; i += MM_ROWS) {
            const mm_t *bp = b + p * ldb, *ai = a + i * lda;
            float *cp = c + i * ldc + PANEL * p;
            if (m - i > 16 && panels - p > 1)
                tiles(ai, bp, ldb, cp, ldc, k, add, 1, 1);
            else if (m - i > 16)
                tiles(ai, bp, ldb, cp, ldc, k, add, 1, 0);
            else if (panels - p > 1)
                tiles(ai, bp, ldb, cp, ldc, k, add, 0, 1);
            else
                tiles(ai, bp, ldb, cp, ldc, k, add, 0, 0);
        }
}

#else

void FN(mm_begin)(void) {}
void FN(mm_end)(void) {}

#define NV (PANEL / VW) /* vectors of a panel's row */
#if defined(__AVX512F__)
enum { MR = 12, NP = 2 }; /* rows and panels at a time: 24 of 32 registers are sums */
#elif defined(__AVX2__)
enum { MR = 6, NP = 1 }; /* 12 of 16 */
#else
enum { MR = 2, NP = 1 }; /* 8 of 16 */
#endif

INLINE void rows_by_panels(const mm_t *a, int64_t lda, const mm_t *b, int64_t ldb, float *c, int64_t ldc, int64_t k, int add, const int rows, const int panels)
{
    vf total[MR][NP * NV];
    UNROLLED
    for (int r = 0; r < rows; r++)
        UNROLLED
        for (int v = 0; v < panels * NV; v++)
            total[r][v] = add ? load(c + r * ldc + v * VW) : splat(0);
    for (int64_t i = 0; i < k; i += MM_PAIR) {
        vf column[NP * NV];
        UNROLLED
        for (int v = 0; v < panels * NV; v++)
            memcpy(&column[v], b + (v / NV) * ldb + PANEL * i + (v % NV) * VW * MM_PAIR, sizeof(vf));
        UNROLLED
        for (int r = 0; r < rows; r++) {
            float pair;
            memcpy(&pair, a + r * lda + i, 4);
            UNROLLED
            for (int v = 0; v < panels * NV; v++)
#if MM_PAIR == 2
                total[r][v] = _mm512_dpbf16_ps(total[r][v], (__m512bh)splat(pair), (__m512bh)column[v]);
#else
                total[r][v] += splat(pair) * column[v];
#endif
        }
    }
    UNROLLED
    for (int r = 0; r < rows; r++)
        UNROLLED
        for (int v = 0; v < panels * NV; v++)
            store(c + r * ldc + v * VW, total[r][v]);
}

void FN(mm)(const mm_t *a, int64_t lda, const mm_t *b, int64_t ldb, float *c, int64_t ldc, int64_t m, int64_t panels, int64_t k, int add)
{
    for (int64_t p = 0; p < panels; p += NP) {
        const mm_t *bp = b + p * ldb;
        float *cp = c + PANEL * p;
        int64_t i = 0;
        if (panels - p >= NP)
            for (; i + MR <= m; i += MR)
                rows_by_panels(a + i * lda, lda, bp, ldb, cp + i * ldc, ldc, k, add, MR, NP);
        for (; i < m; i++)
            if (panels - p >= NP)
                rows_by_panels(a + i * lda, lda, bp, ldb, cp + i * ldc, ldc, k, add, 1, NP);
            else
                rows_by_panels(a + i * lda, lda, bp, ldb, cp + i * ldc, ldc, k, add, 1, 1);
    }
}

#endif

#if MM_PAIR == 2

/* Elements i..i+31 of a row as bf16; those past k are 0. */
INLINE __m512i bf16_32(int kind, const void *row, int64_t i, int64_t k)
{
    if (!row)
        return _mm512_setzero_si512();
    int64_t left = k - i;
    __mmask32 some = left >= 32 ? 0xffffffffu : (1u << left) - 1;
    if (kind == BF16)
        return _mm512_maskz_loadu_epi16(some, (const uint16_t *)row + i);
    __m512 lo, hi;
    if (kind == F16) {
        __m512i halves = _mm512_maskz_loadu_epi16(some, (const uint16_t *)row + i);
        lo = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
        hi = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
    } else {
        lo = _mm512_maskz_loadu_ps((__mmask16)some, (const float *)row + i);
        hi = _mm512_maskz_loadu_ps((__mmask16)(some >> 16), (const float *)row + i + 16);
    }
    return (__m512i)_mm512_cvtne2ps_pbh(hi, lo);
}

void FN(mm_pack_rows)(int kind, const void *const rows[PANEL], int64_t k, mm_t *panel)
{
    int64_t padded = round_up(k, MM_K);
    for (int64_t i = 0; i < k; i += 32) {
        __m512i words[16];
        for (int r = 0; r < PANEL; r++)
            words[r] = bf16_32(kind, rows[r], i, k);
        transpose(words);
        for (int j = 0; j < 16 && i + 2 * j < padded; j++)
            memcpy(panel + PANEL * (i + 2 * j), &words[j], 64);
    }
}

void FN(mm_left_row)(int kind, const void *x, int64_t n, mm_t *a, int64_t k, int64_t row)
{
    for (int64_t i = 0; i < k; i += 32) {
        __m512i words = bf16_32(kind, i < n ? x : NULL, i, n);
        if (MM_K == 32 || i + 32 <= k)
            memcpy(mm_left(a, k, row, i), &words, 64);
        else
            memcpy(mm_left(a, k, row, i), &words, sizeof(mm_t) * (size_t)(k - i));
    }
}

/* Elements i..i+15 in the low halves of words. */
INLINE __m512i bf16_low(int kind, const void *row, int64_t i, __mmask16 some)
{
    if (!row)
        return _mm512_setzero_si512();
    if (kind == BF16)
        return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, (const uint16_t *)row + i));
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, (const float *)row + i)));
}

void FN(mm_left_columns)(int kind, const void *const rows[32], int64_t d, mm_t *a, int64_t k, int64_t column)
{
    for (int64_t i = 0; i < d; i += PANEL) {
        __mmask16 some = d - i >= 16 ? 0xffff : (__mmask16)((1u << (d - i)) - 1);
        __m512i pairs[16];
        for (int r = 0; r < 16; r++)
            pairs[r] = _mm512_or_si512(bf16_low(kind, rows[2 * r], i, some), _mm512_slli_epi32(bf16_low(kind, rows[2 * r + 1], i, some), 16));
        transpose(pairs);
        for (int j = 0; j < 16; j++)
            memcpy(mm_left(a, k, i + j, column), &pairs[j], 64);
    }
}

#else

INLINE float element(int kind, const void *row, int64_t i)
{
    if (!row)
        return 0;
    if (kind == F32)
        return ((const float *)row)[i];
    return kind == BF16 ? bf16_to_float(((const uint16_t *)row)[i]) : f16_to_float(((const uint16_t *)row)[i]);
}

void FN(mm_pack_rows)(int kind, const void *const rows[PANEL], int64_t k, mm_t *panel)
{
    for (int r = 0; r < PANEL; r++)
        for (int64_t i = 0; i < k; i++)
            panel[PANEL * i + r] = element(kind, rows[r], i);
}

void FN(mm_left_row)(int kind, const void *x, int64_t n, mm_t *a, int64_t k, int64_t row)
{
    for (int64_t i = 0; i < k; i++)
        a[row * k + i] = i < n ? element(kind, x, i) : 0;
}

void FN(mm_left_columns)(int kind, const void *const rows[32], int64_t d, mm_t *a, int64_t k, int64_t column)
{
    for (int64_t i = 0; i < round_up(d, PANEL); i++)
        for (int r = 0; r < 32; r++)
            a[i * k + column + r] = i < d ? element(kind, rows[r], i) : 0;
}

#endif
