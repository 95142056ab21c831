/* Products of many rows with weights in blocks, in integers of 16 bits: what avx2 and avx512 have in place of many.h, which there
 * multiplies float32 and bf16. On Intel's processors vpdpwssd multiplies four times as many pairs a cycle as vdpbf16ps, and
 * activations keep 16 bits of each block's largest. */
#ifndef MINILLM_MANY_BLOCKS_H
#define MINILLM_MANY_BLOCKS_H

#include "many.h"
#include "panels.h"

#if defined(__AVX2__) && !defined(MINILLM_AMX)
#define MANY_BLOCKS 1

/* A left operand x (n, k): x = q d, block by block of 32 columns. Rows up to the next multiple of 8 exist. */
typedef struct {
    int16_t *q;      /* (n, k) */
    float *d, *sum;  /* (n, k / 32): sum of the block's x */
    int64_t k;
} Integers;

/* x (n, width), or rms_norm(x) * norm; it lives until the next call. */
Integers FN(left_integers)(const float *x, int64_t n, int64_t width, const float *norm, float eps);

void FN(blocks_many)(const Product *products, int count, Integers a, int64_t n);

/* act(w_gate a) * (w_up a) as a left operand; it lives until the next call. */
Integers FN(blocks_gated)(const Block *block, Integers a, int64_t n);

#endif
#endif
