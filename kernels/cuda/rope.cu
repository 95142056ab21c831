// Rotary position embedding, half-split: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) for the halves of a head.
// Defines: real16 = half, bf16; HEAD_DIM = 64, 128
//
// A thread turns two pairs, elements i, i + 1 with i + d/2, i + d/2 + 1; 256 threads a block. cos, sin: (rows, d/2) float32, one row a token.
// qkv (n, (Hq + 2 H) d) is what the product with q, k and v in one matrix gives, token by token; bias (its columns,) or null.
#include "pages.cuh"

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

// q (Hq, n, d), k and v (H, n, d): q and k turned. Grid (n, blocks over the heads).
extern "C" __global__ void __launch_bounds__(256)
rope_split(const real16* qkv, const float* bias, const float* cos, const float* sin, real16* q, real16* k, real16* v,
           int n_heads, int n_kv_heads) {
    int token = blockIdx.x, n = gridDim.x, columns = n_heads + 2 * n_kv_heads;  // in heads
    int thread = blockIdx.y * blockDim.x + threadIdx.x, head = thread / THREADS, i = thread % THREADS * 2;
    if (head >= columns) return;
    bool is_v = head >= n_heads + n_kv_heads;
    float low[2], high[2];
    turned(qkv + ((size_t)token * columns + head) * D, bias ? bias + head * D : nullptr,
           is_v ? nullptr : cos + (size_t)token * HALF, is_v ? nullptr : sin + (size_t)token * HALF, i, low, high);
    real16* of_kind = head < n_heads ? q : is_v ? v : k;
    int of_head = head < n_heads ? head : (head - n_heads) % n_kv_heads;
    real16* to = of_kind + ((size_t)of_head * n + token) * D;
    store(to + i, low);
    store(to + HALF + i, high);
}

// A decode step: token b of the batch becomes the last entry of each of its heads. q (B, Hq, d); pages (B, H, capacity),
// lengths (B, H) with the new entry counted, seen (B,) its position. cos, sin (B, d/2). Grid (B, blocks over the heads).
extern "C" __global__ void __launch_bounds__(256)
rope_append(const real16* qkv, const float* bias, const float* cos, const float* sin, real16* q,
            const unsigned long long* slabs, int slab_pages, const int* pages, int capacity, const int* lengths,
            const int* seen, int n_heads, int n_kv_heads) {
    int b = blockIdx.x, columns = n_heads + 2 * n_kv_heads;
    int thread = blockIdx.y * blockDim.x + threadIdx.x, head = thread / THREADS, i = thread % THREADS * 2;
    if (head >= columns) return;
    bool is_v = head >= n_heads + n_kv_heads;
    float low[2], high[2];
    turned(qkv + ((size_t)b * columns + head) * D, bias ? bias + head * D : nullptr,
           is_v ? nullptr : cos + (size_t)b * HALF, is_v ? nullptr : sin + (size_t)b * HALF, i, low, high);
    real16* to = q + ((size_t)b * n_heads + head) * D;
    if (head >= n_heads) {
        int row = b * n_kv_heads + (head - n_heads) % n_kv_heads, entry = lengths[row] - 1;
        Page<real16, D> page = page_at<real16, D>(slabs, slab_pages, pages[(size_t)row * capacity + entry / PAGE_SIZE]);
        to = (is_v ? page.v : page.k) + entry % PAGE_SIZE * D;
        if (is_v && i == 0) {
            page.log_size[entry % PAGE_SIZE] = 0.f;
            page.pos[entry % PAGE_SIZE] = seen[b];
        }
    }
    store(to + i, low);
    store(to + HALF + i, high);
}

// out (n, d) = rows (n, d), row r turned back from position pos[r]. cos, sin (positions, d/2), scaled by a factor whose
// square is `norm` (yarn's; 1 for others), so that what RoPE was applied to comes out. Grid: blocks over the rows.
extern "C" __global__ void __launch_bounds__(256)
unrotate(const real16* rows, const int* pos, const float* cos, const float* sin, float norm, real16* out, int n) {
    int thread = blockIdx.x * blockDim.x + threadIdx.x, r = thread / THREADS, i = thread % THREADS * 2;
    if (r >= n) return;
    const real16* row = rows + (size_t)r * D;
    int at = pos[r];
    float low[2], high[2], c[2], s[2];
    load(low, row + i);
    load(high, row + HALF + i);
    load(c, cos + (size_t)at * HALF + i);
    load(s, sin + (size_t)at * HALF + i);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        float a = low[j], b = high[j];
        low[j] = (a * c[j] + b * s[j]) / norm;
        high[j] = (b * c[j] - a * s[j]) / norm;
    }
    store(out + (size_t)r * D + i, low);
    store(out + (size_t)r * D + HALF + i, high);
}
