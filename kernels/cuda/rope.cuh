// Rotary position embedding, half-split: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) for the halves of a head.
//
// A thread turns two pairs, elements i, i + 1 with i + d/2, i + d/2 + 1; 256 threads a block. cos, sin: (rows, d/2) float32, one row a token.
// qkv (n, (Hq + 2 H) d) is what the product with q, k and v in one matrix gives, token by token; bias (its columns,) or null.
#pragma once
#include "common.cuh"

static const int D = HEAD_DIM, HALF = D / 2, THREADS = D / 4;  // of a head

// How a head is turned: over its norm first, where that is not null; v is neither. cos, sin: of its token. factor: of a
// query, the temperature there.
struct Turn {
    const float *norm, *cos, *sin;
    float eps, factor;
};

// The sum of x over the threads of a head.
__device__ __forceinline__ float head_sum(float x) {
    const unsigned mask = FULL_MASK >> (32 - THREADS) << (threadIdx.x & 31 & -THREADS);
#pragma unroll
    for (int offset = THREADS / 2; offset; offset >>= 1) x += __shfl_xor_sync(mask, x, offset);
    return x;
}

// The two pairs at `i` of a head at x, with its bias, turned.
__device__ __forceinline__ void turned(const real16* x, const float* bias, const Turn& turn, int i, float (&low)[2],
                                       float (&high)[2]) {
    load(low, x + i);
    load(high, x + HALF + i);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        low[j] += bias ? bias[i + j] : 0.f;
        high[j] += bias ? bias[HALF + i + j] : 0.f;
    }
    if (turn.norm) {
        float scale = rsqrtf(head_sum(low[0] * low[0] + low[1] * low[1] + high[0] * high[0] + high[1] * high[1]) / D + turn.eps);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            low[j] *= scale * turn.norm[i + j];
            high[j] *= scale * turn.norm[HALF + i + j];
        }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        float a = low[j], b = high[j];
        float c = turn.cos ? turn.cos[i + j] : 1.f, s = turn.cos ? turn.sin[i + j] : 0.f;
        low[j] = (a * c - b * s) * turn.factor;
        high[j] = (b * c + a * s) * turn.factor;
    }
}

// Of head `head` of n_heads queries, then keys, then values of token `token`.
__device__ __forceinline__ Turn turn_of(int head, int n_heads, int n_kv_heads, const float* q_norm, const float* k_norm,
                                        float eps, const float* cos, const float* sin, const float* temperature,
                                        int token) {
    if (head >= n_heads + n_kv_heads) return {nullptr, nullptr, nullptr, eps, 1.f};
    float factor = head < n_heads && temperature ? temperature[token] : 1.f;
    return {head < n_heads ? q_norm : k_norm, cos + (size_t)token * HALF, sin + (size_t)token * HALF, eps, factor};
}
