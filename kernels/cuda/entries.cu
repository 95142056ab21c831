// Entries of a layer into their pages, and out of them.
// Defines: real16 = half, bf16; HEAD_DIM = 64, 128; page_type = real16, int8
//
// k, v (E, d) real16, in pages real16 or int8; log_size (E,), pos (E,): heads one after another; those of head h are rows first[h] : first[h + 1]
// and lie in its pages from entry start[h] on. What is NULL is not read. pages (H, capacity). Grid: a row to d / 8 threads, 256 threads a block.
#include "pages.cuh"

static const int D = HEAD_DIM, THREADS = D / 8;  // 8 elements a thread

// The page of row `row` of the entries, and its place in it.
__device__ __forceinline__ Page<page_type, D> place(int row, const unsigned long long* slabs, int slab_pages, const int* pages,
                                                 int capacity, const int* first, const int* start, int n_kv_heads, int& at) {
    int head = segment_of(row, first, n_kv_heads), entry = start[head] + row - first[head];
    at = entry % PAGE_SIZE;
    return page_at<page_type, D>(slabs, slab_pages, pages[(size_t)head * capacity + entry / PAGE_SIZE]);
}

// A thread's share of a row into a page.
__device__ __forceinline__ void put(real16* to, bf16*, const real16* from) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
}

__device__ __forceinline__ void put(int8* to, bf16* scale, const real16* from) {
    float x[8];
    load(x, from);
    const bf16 s = int8_scale<THREADS>(x);
    store_int8(to, x, to_float(s));
    if (threadIdx.x % THREADS == 0) *scale = s;
}

// And out of it.
__device__ __forceinline__ void get(real16* to, const real16* from, const bf16*) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
}

__device__ __forceinline__ void get(real16* to, const int8* from, const bf16* scale) {
    float x[8];
    load(x, from);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] *= to_float(*scale);
    store(to, x);
}

extern "C" __global__ void __launch_bounds__(256)
write_entries(const real16* k, const real16* v, const float* log_size, const int* pos, const unsigned long long* slabs,
              int slab_pages, const int* pages, int capacity, const int* first, const int* start, int n_kv_heads, int n_rows) {
    int row = (blockIdx.x * blockDim.x + threadIdx.x) / THREADS, i = threadIdx.x % THREADS * 8, at;
    if (row >= n_rows) return;
    Page<page_type, D> page = place(row, slabs, slab_pages, pages, capacity, first, start, n_kv_heads, at);
    put(page.k + at * D + i, page.k_scale + at, k + (size_t)row * D + i);
    put(page.v + at * D + i, page.v_scale + at, v + (size_t)row * D + i);
    if (i == 0) {
        page.log_size[at] = log_size[row];
        page.pos[at] = pos[row];
    }
}

extern "C" __global__ void __launch_bounds__(256)
read_entries(real16* k, real16* v, float* log_size, int* pos, const unsigned long long* slabs, int slab_pages,
             const int* pages, int capacity, const int* first, const int* start, int n_kv_heads, int n_rows) {
    int row = (blockIdx.x * blockDim.x + threadIdx.x) / THREADS, i = threadIdx.x % THREADS * 8, at;
    if (row >= n_rows) return;
    Page<page_type, D> page = place(row, slabs, slab_pages, pages, capacity, first, start, n_kv_heads, at);
    if (k) get(k + (size_t)row * D + i, page.k + at * D + i, page.k_scale + at);
    if (v) get(v + (size_t)row * D + i, page.v + at * D + i, page.v_scale + at);
    if (i == 0 && log_size) log_size[row] = page.log_size[at];
    if (i == 0 && pos) pos[row] = page.pos[at];
}
