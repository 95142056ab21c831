// What every kernel needs: the 16-bit float types, conversions, vector loads, sums over a warp and a block.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef __nv_bfloat16 bf16;
typedef signed char int8;
#define FULL_MASK 0xffffffffu
#define NEG_INF __int_as_float(0xff800000)  // NVRTC has no <math.h>, hence no INFINITY

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(int8 x) { return x; }
__device__ __forceinline__ float to_float(half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ half from_float<half>(float x) { return __float2half(x); }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16(x); }

// N elements that are loaded and stored at once: N * sizeof(T) is 2, 4, 8 or 16, and so is the alignment.
template <class T, int N>
struct __align__(sizeof(T) * N) Pack { T v[N]; };

template <int N, class T>
__device__ __forceinline__ void load(float (&out)[N], const T* p) {
    Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(p);
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = to_float(pack.v[i]);
}

template <int N, class T>
__device__ __forceinline__ void store(T* p, const float (&x)[N]) {
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.v[i] = from_float<T>(x[i]);
    *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(FULL_MASK, x, offset);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, offset));
    return x;
}

// g / (1 + exp(-(linear g + cubic g^3))): silu with 1 and 0, gelu by tanh with its two.
__device__ __forceinline__ float activated(float g, float linear, float cubic) {
    return g / (1.f + __expf(-g * (linear + cubic * g * g)));
}

// The sum over a block of whole warps, in all of its threads. partial: 33 floats of shared memory.
__device__ __forceinline__ float block_sum(float x, float* partial) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    x = warp_sum(x);
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    if (warp == 0) {
        x = warp_sum(lane < (int)(blockDim.x >> 5) ? partial[lane] : 0.f);
        if (lane == 0) partial[32] = x;
    }
    __syncthreads();
    return partial[32];
}

// The sum of `own` over the threads of the block up to this one. sums: an int of shared memory for each thread.
__device__ __forceinline__ int block_scan(int own, int* sums) {
    int thread = threadIdx.x;
    sums[thread] = own;
    __syncthreads();
    for (int offset = 1; offset < blockDim.x; offset *= 2) {
        int other = thread >= offset ? sums[thread - offset] : 0;
        __syncthreads();
        sums[thread] += other;
        __syncthreads();
    }
    return sums[thread];
}

// The segment of row `row`: first[i] <= row < first[i + 1]; first (n + 1,).
__device__ __forceinline__ int segment_of(int row, const int* first, int n) {
    int low = 0, high = n;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        (first[middle] <= row ? low : high) = middle;
    }
    return low;
}
