// Queries and keys of a prompt turned to their positions (rope.cuh), and keys turned back.
// Defines: real16 = half, bf16; HEAD_DIM = head sizes
#include "rope.cuh"

// q (Hq, n, d), k and v (H, n, d): q and k over their norms (d,), where not null, and turned; q times temperature (n,),
// where not null. Grid (n, blocks over the heads).
extern "C" __global__ void __launch_bounds__(256)
rope_split(const real16* qkv, const float* bias, const float* q_norm, const float* k_norm, float eps, const float* cos,
           const float* sin, const float* temperature, real16* q, real16* k, real16* v, int n_heads, int n_kv_heads) {
    int token = blockIdx.x, n = gridDim.x, columns = n_heads + 2 * n_kv_heads;  // in heads
    int thread = blockIdx.y * blockDim.x + threadIdx.x, head = thread / TEAM, i = thread % TEAM * PAIRS;
    if (head >= columns) return;
    bool is_v = head >= n_heads + n_kv_heads;
    float low[PAIRS], high[PAIRS];
    turned(qkv + ((size_t)token * columns + head) * D, bias ? bias + head * D : nullptr,
           turn_of(head, n_heads, n_kv_heads, q_norm, k_norm, eps, cos, sin, temperature, token), i, low, high);
    if (i >= HALF) return;
    real16* of_kind = head < n_heads ? q : is_v ? v : k;
    int of_head = head < n_heads ? head : (head - n_heads) % n_kv_heads;
    real16* to = of_kind + ((size_t)of_head * n + token) * D;
    store(to + i, low);
    store(to + HALF + i, high);
}

// out (n, d) = rows (n, d), row r turned back from position pos[r]. cos, sin (positions, d/2). factor (d/2,), or null for
// ones: what both carry for each pair (yarn's); it is taken out, so that what RoPE was applied to comes out.
// Grid: blocks over the rows' teams.
extern "C" __global__ void __launch_bounds__(256)
unrotate(const real16* rows, const int* pos, const float* cos, const float* sin, const float* factor, real16* out,
         int n) {
    int thread = blockIdx.x * blockDim.x + threadIdx.x, r = thread / TEAM, i = thread % TEAM * PAIRS;
    if (r >= n || i >= HALF) return;
    const real16* row = rows + (size_t)r * D;
    int at = pos[r];
    float low[PAIRS], high[PAIRS], c[PAIRS], s[PAIRS];
    load(low, row + i);
    load(high, row + HALF + i);
    load(c, cos + (size_t)at * HALF + i);
    load(s, sin + (size_t)at * HALF + i);
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) {
        float a = low[j], b = high[j], norm = factor ? factor[i + j] * factor[i + j] : 1.f;
        low[j] = (a * c[j] + b * s[j]) / norm;
        high[j] = (b * c[j] - a * s[j]) / norm;
    }
    store(out + (size_t)r * D + i, low);
    store(out + (size_t)r * D + HALF + i, high);
}
