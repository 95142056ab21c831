/* The small matrix product under prefill: C (m, 16 p) = A (m, k) x B (k, 16 p), in the layout each path is fastest with.
 *
 * A, the left operand, is mm_t, row-major; on AMX blocks of 32 rows, each [k / 32][32 rows][32 columns]: a step of the product reads
 * 2 KiB that lie together, which the processor fetches ahead, where rows 2 k bytes apart met in a few sets of the L1 cache
 * (1.3 to 1.5 times slower). B is panels of 16 columns, each [k / MM_PAIR][16][MM_PAIR] mm_t, `ldb` elements apart: pairs of bf16
 * that lie next to one another are what both vdpbf16ps and tdpbf16ps multiply; the other paths multiply float32. k is a multiple of
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
enum { MM_K = 32, MM_ROWS = 32 };
#else
enum { MM_K = MM_PAIR, MM_ROWS = 1 };
#endif

/* Before the first and after the last product of a task: the tile registers' configuration belongs to the thread. */
void FN(mm_begin)(void);
void FN(mm_end)(void);

/* The first k columns of a left operand (., lda), from a row on that is a multiple of MM_ROWS. add: C grows by the product instead of
 * becoming it. */
void FN(mm)(const mm_t *a, int64_t lda, const mm_t *b, int64_t ldb, float *c, int64_t ldc, int64_t m, int64_t panels, int64_t k, int add);

/* One panel of B whose columns are 16 rows of k elements of `kind` (F32, F16, BF16); a NULL row is zeros. K is padded to MM_K. */
void FN(mm_pack_rows)(int kind, const void *const rows[PANEL], int64_t k, mm_t *panel);

/* Where row `row` of the left operand a (., k) has its columns from `column`, a multiple of MM_K. */
INLINE mm_t *mm_left(mm_t *a, int64_t k, int64_t row, int64_t column)
{
#if defined(MINILLM_AMX)
    return a + row / MM_ROWS * MM_ROWS * k + column * MM_ROWS + row % MM_ROWS * MM_K;
#else
    return a + row * k + column;
#endif
}

/* x (n,) of `kind` (F32 or BF16) to a row of the left operand a (., k), padded with zeros; NULL is zeros. */
void FN(mm_left_row)(int kind, const void *x, int64_t n, mm_t *a, int64_t k, int64_t row);

/* 32 rows (d,) of `kind` (F32 or BF16) as the columns column .. column + 31 of the left operand a (round_up(d, PANEL), k). */
void FN(mm_left_columns)(int kind, const void *const rows[32], int64_t d, mm_t *a, int64_t k, int64_t column);

#endif
