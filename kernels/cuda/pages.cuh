// Where the stored entries of a head lie: see PagePool in cache.py, ops/pages.py and Paged in launch/pages.py.
//
// A page holds PAGE_SIZE entries of one KV head of one layer. A slab is slab_pages pages, its fields one after another:
// K and V (slab_pages, PAGE_SIZE, d) real16, log s (slab_pages, PAGE_SIZE) float, position (slab_pages, PAGE_SIZE) int.
// K and V may be int8: then after them come the scales of their rows, (slab_pages, PAGE_SIZE) bf16 each.
// A page id is slab * slab_pages + page within the slab; `slabs` holds the addresses of the slabs.
#pragma once
#include "common.cuh"

#define PAGE_SIZE 32

template <class T, int D>
struct Page {
    T *k, *v;                 // (PAGE_SIZE, D)
    bf16 *k_scale, *v_scale;  // of int8
    float* log_size;
    int* pos;
};

template <class T, int D>
__device__ __forceinline__ Page<T, D> page_at(const unsigned long long* slabs, int slab_pages, int id) {
    int slab = id / slab_pages, page = id - slab * slab_pages;
    size_t n = (size_t)slab_pages * PAGE_SIZE, first = (size_t)page * PAGE_SIZE;
    T* k = reinterpret_cast<T*>(slabs[slab]);
    T* v = k + n * D;
    bf16* k_scale = reinterpret_cast<bf16*>(v + n * D);
    bf16* v_scale = k_scale + (sizeof(T) == sizeof(int8) ? n : 0);
    float* log_size = reinterpret_cast<float*>(v_scale + (sizeof(T) == sizeof(int8) ? n : 0));
    int* pos = reinterpret_cast<int*>(log_size + n);
    return {k + first * D, v + first * D, k_scale + first, v_scale + first, log_size + first, pos + first};
}

// The scale of a row in int8, max|x| / 127 in bf16, in each of LANES lanes that follow one another (a power of 2) and
// hold N elements each.
template <int LANES, int N>
__device__ __forceinline__ bf16 int8_scale(const float (&x)[N]) {
    const unsigned mask = FULL_MASK >> (32 - LANES) << (threadIdx.x & 31 & -LANES);
    float top = 0.f;
#pragma unroll
    for (int i = 0; i < N; ++i) top = fmaxf(top, fabsf(x[i]));
#pragma unroll
    for (int offset = LANES / 2; offset; offset >>= 1) top = fmaxf(top, __shfl_xor_sync(mask, top, offset));
    return from_float<bf16>(top / 127.f);
}

// N elements of a row at that scale.
template <int N>
__device__ __forceinline__ void store_int8(int8* to, const float (&x)[N], float scale) {
    Pack<int8, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i)
        pack.v[i] = scale > 0.f ? (int8)fminf(fmaxf(rintf(x[i] / scale), -127.f), 127.f) : 0;
    *reinterpret_cast<Pack<int8, N>*>(to) = pack;
}
