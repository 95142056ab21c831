// A token of each sequence: its query turned to its position, its key too and with its value into the pages.
// Defines: real16 = half, bf16; HEAD_DIM = head sizes; FORMAT = page formats
#include "page_formats.cuh"
#include "rope.cuh"

// Token b of the batch becomes the last entry of each of its heads. q (B, Hq, d); pages (B, H, capacity),
// lengths (B, H) with the new entry counted, seen (B,) its position. Norms, cos, sin (B, d/2), temperature (B,) as in
// rope_split. Grid (B, blocks over the heads).
extern "C" __global__ void __launch_bounds__(256)
rope_append(const real16* qkv, const float* bias, const float* q_norm, const float* k_norm, float eps, const float* cos,
            const float* sin, const float* temperature, real16* q, const unsigned long long* slabs, int slab_pages,
            const int* pages, int capacity, const int* lengths, const int* seen, int n_heads, int n_kv_heads) {
    int b = blockIdx.x, columns = n_heads + 2 * n_kv_heads;
    int thread = blockIdx.y * blockDim.x + threadIdx.x, head = thread / TEAM, i = thread % TEAM * PAIRS;
    if (head >= columns) return;
    bool is_v = head >= n_heads + n_kv_heads;
    float low[PAIRS], high[PAIRS];
    turned(qkv + ((size_t)b * columns + head) * D, bias ? bias + head * D : nullptr,
           turn_of(head, n_heads, n_kv_heads, q_norm, k_norm, eps, cos, sin, temperature, b), i, low, high);
    real16 x[2 * PAIRS];  // whose other pairs the head's other threads bring
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) {
        x[j] = from_float<real16>(low[j]);
        x[PAIRS + j] = from_float<real16>(high[j]);
    }
    if (head < n_heads) return WordRows::store<2>(q + ((size_t)b * n_heads + head) * D, nullptr, i, x);
    int row = b * n_kv_heads + (head - n_heads) % n_kv_heads, entry = lengths[row] - 1, at = entry % PAGE_SIZE;
    const auto page = page_at<FORMAT>(slabs, slab_pages, pages[(size_t)row * capacity + entry / PAGE_SIZE]);
    if (is_v)
        FORMAT::V::store<2>(page.v + at * FORMAT::V::ROW, page.v_scale + at, i, x);
    else
        FORMAT::K::store<2>(page.k + at * FORMAT::K::ROW, page.k_scale + at, i, x);
    if (is_v && i == 0) {
        page.log_size[at] = 0.f;
        page.pos[at] = seen[b];
    }
}
