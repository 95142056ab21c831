// Where the stored entries of a head lie: see PagePool in cache/page_pool.py, ops/pages.py and Paged in launch/pages.py.
//
// A page holds PAGE_SIZE entries of one KV head of one layer. A slab is slab_pages pages, its fields one after another:
// rows of K and V (slab_pages, PAGE_SIZE, ROW) Word, their scales, if the formats have them, (slab_pages, PAGE_SIZE) bf16,
// log s (slab_pages, PAGE_SIZE) float, position (slab_pages, PAGE_SIZE) int. Format: see page_formats.cuh.
// A page id is slab * slab_pages + page within the slab; `slabs` holds the addresses of the slabs.
#pragma once
#include "common.cuh"

#define PAGE_SIZE 32

template <class Format>
struct Page {
    typename Format::K::Word* k;  // (PAGE_SIZE, ROW)
    typename Format::V::Word* v;
    bf16 *k_scale, *v_scale;       // not to be read where the format has none
    float* log_size;
    int* pos;
};

template <class Format>
__device__ __forceinline__ Page<Format> page_at(const unsigned long long* slabs, int slab_pages, int id) {
    typedef typename Format::K K;
    typedef typename Format::V V;
    int slab = id / slab_pages, page = id - slab * slab_pages;
    size_t n = (size_t)slab_pages * PAGE_SIZE, first = (size_t)page * PAGE_SIZE;
    auto* k = reinterpret_cast<typename K::Word*>(slabs[slab]);
    auto* v = reinterpret_cast<typename V::Word*>(k + n * K::ROW);
    bf16* k_scale = reinterpret_cast<bf16*>(v + n * V::ROW);
    bf16* v_scale = k_scale + (K::SCALED ? n : 0);
    float* log_size = reinterpret_cast<float*>(v_scale + (V::SCALED ? n : 0));
    int* pos = reinterpret_cast<int*>(log_size + n);
    return {k + first * K::ROW, v + first * V::ROW, k_scale + first, v_scale + first, log_size + first, pos + first};
}
