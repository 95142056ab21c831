// Rows of a stored matrix as floats: embedding rows of some tokens, and stretches of a matrix for cuBLAS.
// Defines: WEIGHT = F16, BF16, Q8_0, Q4_0, Q4_1
//
// The matrix (n_out, n_in): words and scales as weights.cuh has them. Grid (rows, blocks of 128 threads over the chunks).
#include "weights.cuh"

// x (n, n_in) float32 = rows ids (n,) of the matrix
extern "C" __global__ void __launch_bounds__(128)
embed(const unsigned char* words, const half* scales, const int* ids, float* x, int n_in) {
    int chunks = n_in / WEIGHT::CHUNK, c = blockIdx.y * blockDim.x + threadIdx.x;
    if (c >= chunks) return;
    float w[WEIGHT::CHUNK];
    WEIGHT::read(words, scales, (size_t)ids[blockIdx.x] * chunks + c, w);
    float* to = x + (size_t)blockIdx.x * n_in + c * WEIGHT::CHUNK;
#pragma unroll
    for (int i = 0; i < WEIGHT::CHUNK; ++i) to[i] = w[i];
}

// out (gridDim.x, n_in) Real16 = rows first, first + 1, ... of the matrix
extern "C" __global__ void __launch_bounds__(128)
dequantize(const unsigned char* words, const half* scales, int first, half* out_words, int n_in) {
    int chunks = n_in / WEIGHT::CHUNK, c = blockIdx.y * blockDim.x + threadIdx.x;
    if (c >= chunks) return;
    float w[WEIGHT::CHUNK];
    WEIGHT::read(words, scales, ((size_t)first + blockIdx.x) * chunks + c, w);
    WEIGHT::Real16* to = reinterpret_cast<WEIGHT::Real16*>(out_words) + (size_t)blockIdx.x * n_in + c * WEIGHT::CHUNK;
#pragma unroll
    for (int i = 0; i < WEIGHT::CHUNK; ++i) to[i] = from_float<WEIGHT::Real16>(w[i]);
}
