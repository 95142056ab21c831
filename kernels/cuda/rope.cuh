// Rotary position embedding, half-split: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) for the halves of a head.
//
// A thread of a head's team turns 4 pairs, elements i .. i + 3 with those d/2 further on; 256 threads a block. cos, sin:
// (rows, d/2) float32, one row a token.
// qkv (n, (Hq + 2 H) d) is what the product with q, k and v in one matrix gives, token by token; bias (its columns,) or null.
#pragma once
#include "rows.cuh"

#define PAIRS 4

// How a head is turned: over its norm first, where that is not null; v is neither. cos, sin: of its token. factor: of a
// query, the temperature there.
struct Turn {
    const float *norm, *cos, *sin;
    float eps, factor;
};

// The pairs at `i` of a head at x, with its bias, turned: zeros beyond the head.
__device__ __forceinline__ void turned(const real16* x, const float* bias, const Turn& turn, int i, float (&low)[PAIRS],
                                       float (&high)[PAIRS]) {
    const bool there = i < HALF;
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) low[j] = high[j] = 0.f;
    if (there) {
        load(low, x + i);
        load(high, x + HALF + i);
#pragma unroll
        for (int j = 0; j < PAIRS; ++j) {
            low[j] += bias ? bias[i + j] : 0.f;
            high[j] += bias ? bias[HALF + i + j] : 0.f;
            sum += low[j] * low[j] + high[j] * high[j];
        }
    }
    const float scale = turn.norm ? rsqrtf(Team::sum(sum) / D + turn.eps) : 1.f;
    if (!there) return;
    if (turn.norm)
#pragma unroll
        for (int j = 0; j < PAIRS; ++j) {
            low[j] *= scale * turn.norm[i + j];
            high[j] *= scale * turn.norm[HALF + i + j];
        }
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) {
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
