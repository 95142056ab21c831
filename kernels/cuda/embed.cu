// Rows of a stored matrix as floats: embedding rows of some tokens, and stretches of a matrix for cuBLAS.
// Defines: WEIGHT = F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K
//
// The matrix (n_out, n_in): words and scales as weights.cuh has them. Grid (rows, blocks of 128 threads over the chunks).
#include "weights.cuh"

template <class T>
__device__ __forceinline__ void copy_chunk(const unsigned char* words, const half* scales, size_t chunk, float scale, T* to) {
    WEIGHT::Raw raw = WEIGHT::fetch(words, scales, chunk);
#pragma unroll
    for (int part = 0; part < WEIGHT::CHUNK / 8; ++part) {
        float w[8];
        WEIGHT::decode(raw, part, w);
#pragma unroll
        for (int i = 0; i < 8; ++i) to[part * 8 + i] = from_float<T>(scale * w[i]);
    }
}

// x (n, n_in) float32 = scale times rows ids (n,) of the matrix
extern "C" __global__ void __launch_bounds__(128)
embed(const unsigned char* words, const half* scales, const int* ids, float scale, float* x, int n_in) {
    int chunks = n_in / WEIGHT::CHUNK, c = blockIdx.y * blockDim.x + threadIdx.x;
    if (c >= chunks) return;
    copy_chunk(words, scales, (size_t)ids[blockIdx.x] * chunks + c, scale, x + (size_t)blockIdx.x * n_in + c * WEIGHT::CHUNK);
}

// out (gridDim.x, n_in) Real16 = rows first, first + 1, ... of the matrix
extern "C" __global__ void __launch_bounds__(128)
dequantize(const unsigned char* words, const half* scales, int first, half* out_words, int n_in) {
    int chunks = n_in / WEIGHT::CHUNK, c = blockIdx.y * blockDim.x + threadIdx.x;
    if (c >= chunks) return;
    WEIGHT::Real16* out = reinterpret_cast<WEIGHT::Real16*>(out_words);
    copy_chunk(words, scales, ((size_t)first + blockIdx.x) * chunks + c, 1.f, out + (size_t)blockIdx.x * n_in + c * WEIGHT::CHUNK);
}
