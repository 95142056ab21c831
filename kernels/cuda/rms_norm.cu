// out = x / sqrt(mean(x^2) + eps) * weight, row by row (Zhang & Sennrich 2019, eq. 4).
// Defines: real16 = half, bf16
//
// x (n, dim) float32, the residual stream; weight (dim,) float32; out (n, dim) real16, what the next product reads.
// Grid: a block a row. dim: a multiple of 4.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256)
rms_norm(const float* x, const float* weight, float eps, real16* out, int dim) {
    __shared__ float partial[33];
    const float* row = x + (size_t)blockIdx.x * dim;
    float sum = 0.f;
    for (int i = threadIdx.x * 4; i < dim; i += blockDim.x * 4) {
        float a[4];
        load(a, row + i);
        sum += a[0] * a[0] + a[1] * a[1] + a[2] * a[2] + a[3] * a[3];
    }
    float scale = rsqrtf(block_sum(sum, partial) / dim + eps);
    for (int i = threadIdx.x * 4; i < dim; i += blockDim.x * 4) {
        float a[4], w[4];
        load(a, row + i);
        load(w, weight + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) a[j] *= scale * w[j];
        store(out + (size_t)blockIdx.x * dim + i, a);
    }
}
