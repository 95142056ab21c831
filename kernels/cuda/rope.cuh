// Rotary position embedding, half-split: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) for the halves of a head.
//
// A thread turns two pairs, elements i, i + 1 with i + d/2, i + d/2 + 1; 256 threads a block. cos, sin: (rows, d/2) float32, one row a token.
// qkv (n, (Hq + 2 H) d) is what the product with q, k and v in one matrix gives, token by token; bias (its columns,) or null.
#pragma once
#include "common.cuh"

static const int D = HEAD_DIM, HALF = D / 2, THREADS = D / 4;  // of a head

// The two pairs at `i` of a head at x, turned by cos and sin (null: not turned).
__device__ __forceinline__ void turned(const real16* x, const float* bias, const float* cos, const float* sin, int i,
                                       float (&low)[2], float (&high)[2]) {
    load(low, x + i);
    load(high, x + HALF + i);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        float a = low[j] + (bias ? bias[i + j] : 0.f), b = high[j] + (bias ? bias[HALF + i + j] : 0.f);
        float c = cos ? cos[i + j] : 1.f, s = cos ? sin[i + j] : 0.f;
        low[j] = a * c - b * s;
        high[j] = b * c + a * s;
    }
}
