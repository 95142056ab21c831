// Where the stored entries of a head lie: see PagePool in cache.py and Paged in launch/pages.py.
//
// A page holds PAGE_SIZE entries of one KV head of one layer. A slab is slab_pages pages, its fields one after another:
// K and V (slab_pages, PAGE_SIZE, d) real16, log s (slab_pages, PAGE_SIZE) float, position (slab_pages, PAGE_SIZE) int.
// A page id is slab * slab_pages + page within the slab; `slabs` holds the addresses of the slabs.
#pragma once
#include "common.cuh"

#define PAGE_SIZE 32

template <class T, int D>
struct Page {
    T *k, *v;  // (PAGE_SIZE, D)
    float* log_size;
    int* pos;
};

template <class T, int D>
__device__ __forceinline__ Page<T, D> page_at(const unsigned long long* slabs, int slab_pages, int id) {
    int slab = id / slab_pages, page = id - slab * slab_pages;
    size_t n = (size_t)slab_pages * PAGE_SIZE, first = (size_t)page * PAGE_SIZE;
    T* k = reinterpret_cast<T*>(slabs[slab]);
    T* v = k + n * D;
    float* log_size = reinterpret_cast<float*>(v + n * D);
    int* pos = reinterpret_cast<int*>(log_size + n);
    return {k + first * D, v + first * D, log_size + first, pos + first};
}
