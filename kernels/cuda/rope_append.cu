// A token of each sequence: its query turned to its position, its key too and with its value into the pages.
// Defines: real16 = half, bf16; HEAD_DIM = 64, 128; page_type = real16, int8
#include "pages.cuh"
#include "rope.cuh"

// Two pairs into a row of 16 bits.
__device__ __forceinline__ void put(real16* row, bf16*, int i, const float (&low)[2], const float (&high)[2]) {
    store(row + i, low);
    store(row + HALF + i, high);
}

// And into a row of 8, whose other pairs the head's other threads bring: of what 16 bits would hold, as in a prompt.
__device__ __forceinline__ void put(int8* row, bf16* scale, int i, const float (&low)[2], const float (&high)[2]) {
    float x[4] = {low[0], low[1], high[0], high[1]};
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = to_float(from_float<real16>(x[j]));
    const bf16 s = int8_scale<THREADS>(x);
    store_int8(row + i, {x[0], x[1]}, to_float(s));
    store_int8(row + HALF + i, {x[2], x[3]}, to_float(s));
    if (i == 0) *scale = s;
}

// Token b of the batch becomes the last entry of each of its heads. q (B, Hq, d); pages (B, H, capacity),
// lengths (B, H) with the new entry counted, seen (B,) its position. Norms, cos, sin (B, d/2), temperature (B,) as in rope_split. Grid (B, blocks over the heads).
extern "C" __global__ void __launch_bounds__(256)
rope_append(const real16* qkv, const float* bias, const float* q_norm, const float* k_norm, float eps, const float* cos,
            const float* sin, const float* temperature, real16* q, const unsigned long long* slabs, int slab_pages, const int* pages, int capacity, const int* lengths,
            const int* seen, int n_heads, int n_kv_heads) {
    int b = blockIdx.x, columns = n_heads + 2 * n_kv_heads;
    int thread = blockIdx.y * blockDim.x + threadIdx.x, head = thread / THREADS, i = thread % THREADS * 2;
    if (head >= columns) return;
    bool is_v = head >= n_heads + n_kv_heads;
    float low[2], high[2];
    turned(qkv + ((size_t)b * columns + head) * D, bias ? bias + head * D : nullptr,
           turn_of(head, n_heads, n_kv_heads, q_norm, k_norm, eps, cos, sin, temperature, b), i, low, high);
    if (head < n_heads) return put(q + ((size_t)b * n_heads + head) * D, nullptr, i, low, high);
    int row = b * n_kv_heads + (head - n_heads) % n_kv_heads, entry = lengths[row] - 1, at = entry % PAGE_SIZE;
    Page<page_type, D> page = page_at<page_type, D>(slabs, slab_pages, pages[(size_t)row * capacity + entry / PAGE_SIZE]);
    put((is_v ? page.v : page.k) + at * D, (is_v ? page.v_scale : page.k_scale) + at, i, low, high);
    if (is_v && i == 0) {
        page.log_size[at] = 0.f;
        page.pos[at] = seen[b];
    }
}
