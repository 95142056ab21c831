// Entries of a layer into their pages, and out of them.
// Defines: real16 = half, bf16; HEAD_DIM = head sizes; FORMAT = page formats
//
// k, v (E, d) real16, log_size (E,), pos (E,): heads one after another; those of head h are rows first[h] : first[h + 1]
// and lie in its pages from entry start[h] on. What is NULL is not read. pages (H, capacity). Grid: a team a row, 256 threads a block.
#include "page_formats.cuh"

// The page of row `row` of the entries, and its place in it.
__device__ __forceinline__ Page<FORMAT> place(int row, const unsigned long long* slabs, int slab_pages, const int* pages,
                                              int capacity, const int* first, const int* start, int n_kv_heads, int& at) {
    int head = segment_of(row, first, n_kv_heads), entry = start[head] + row - first[head];
    at = entry % PAGE_SIZE;
    return page_at<FORMAT>(slabs, slab_pages, pages[(size_t)head * capacity + entry / PAGE_SIZE]);
}

extern "C" __global__ void __launch_bounds__(256)
write_entries(const real16* k, const real16* v, const float* log_size, const int* pos, const unsigned long long* slabs,
              int slab_pages, const int* pages, int capacity, const int* first, const int* start, int n_kv_heads, int n_rows) {
    int row = (blockIdx.x * blockDim.x + threadIdx.x) / TEAM, i = threadIdx.x % TEAM * 8, at;
    if (row >= n_rows) return;
    const auto page = place(row, slabs, slab_pages, pages, capacity, first, start, n_kv_heads, at);
    real16 x[8];
    WordRows::load(x, k + (size_t)row * D, nullptr, i);
    FORMAT::K::store<1>(page.k + at * FORMAT::K::ROW, page.k_scale + at, i, x);
    WordRows::load(x, v + (size_t)row * D, nullptr, i);
    FORMAT::V::store<1>(page.v + at * FORMAT::V::ROW, page.v_scale + at, i, x);
    if (i == 0) {
        page.log_size[at] = log_size[row];
        page.pos[at] = pos[row];
    }
}

extern "C" __global__ void __launch_bounds__(256)
read_entries(real16* k, real16* v, float* log_size, int* pos, const unsigned long long* slabs, int slab_pages,
             const int* pages, int capacity, const int* first, const int* start, int n_kv_heads, int n_rows) {
    int row = (blockIdx.x * blockDim.x + threadIdx.x) / TEAM, i = threadIdx.x % TEAM * 8, at;
    if (row >= n_rows) return;
    const auto page = place(row, slabs, slab_pages, pages, capacity, first, start, n_kv_heads, at);
    real16 x[8];
    if (k) {
        FORMAT::K::load(x, page.k + at * FORMAT::K::ROW, page.k_scale + at, i);
        WordRows::store<1>(k + (size_t)row * D, nullptr, i, x);
    }
    if (v) {
        FORMAT::V::load(x, page.v + at * FORMAT::V::ROW, page.v_scale + at, i);
        WordRows::store<1>(v + (size_t)row * D, nullptr, i, x);
    }
    if (i == 0 && log_size) log_size[row] = page.log_size[at];
    if (i == 0 && pos) pos[row] = page.pos[at];
}
