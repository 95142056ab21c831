// Rows of HEAD_DIM elements shared out to threads. HEAD_DIM is a multiple of 16 from 64 to 256; with it come TEAM and QUERIES
// (launch/head_sizes.py).
#pragma once
#include "common.cuh"

static const int D = HEAD_DIM, HALF = D / 2;

// A row to a team, TEAM threads of a warp that follow one another. A thread has 8 elements; those at the end may have none.
struct Team {
    static __device__ __forceinline__ unsigned mask() { return FULL_MASK >> (32 - TEAM) << (threadIdx.x & 31 & -TEAM); }

    static __device__ __forceinline__ float sum(float x) {
#pragma unroll
        for (int offset = TEAM / 2; offset; offset >>= 1) x += __shfl_xor_sync(mask(), x, offset);
        return x;
    }
    static __device__ __forceinline__ float max(float x) {
#pragma unroll
        for (int offset = TEAM / 2; offset; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(mask(), x, offset));
        return x;
    }
};

// A row to a warp, in registers: part p of a lane is WIDE elements that follow one another, zeros beyond the row.
struct WarpRow {
    static const int WIDE = D > 64 ? 4 : 2, PARTS = (D + 32 * WIDE - 1) / (32 * WIDE);
    float x[PARTS][WIDE];

    static __device__ __forceinline__ int element(int part) { return (part * 32 + (threadIdx.x & 31)) * WIDE; }

    template <class T>
    __device__ __forceinline__ explicit WarpRow(const T* row) {
#pragma unroll
        for (int p = 0; p < PARTS; ++p) {
#pragma unroll
            for (int i = 0; i < WIDE; ++i) x[p][i] = 0.f;
            if (element(p) < D) load(x[p], row + element(p));
        }
    }
    // The dot product with another, in every lane.
    __device__ __forceinline__ float dot(const WarpRow& other) const {
        float sum = 0.f;
#pragma unroll
        for (int p = 0; p < PARTS; ++p)
#pragma unroll
            for (int i = 0; i < WIDE; ++i) sum = fmaf(x[p][i], other.x[p][i], sum);
        return warp_sum(sum);
    }
};
