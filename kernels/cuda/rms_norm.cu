// x / sqrt(mean(x^2) + eps) * weight, row by row (Zhang & Sennrich 2019, eq. 4).
// Defines: real16 = half, bf16
//
// weight (dim,) float32. Grid: a block a row. dim: a multiple of 4.
#include "common.cuh"

// What every element of a row is multiplied by, beside its weight.
__device__ __forceinline__ float scale_of(const float* row, float eps, int dim) {
    __shared__ float partial[33];
    float sum = 0.f;
    for (int i = threadIdx.x * 4; i < dim; i += blockDim.x * 4) {
        float a[4];
        load(a, row + i);
        sum += a[0] * a[0] + a[1] * a[1] + a[2] * a[2] + a[3] * a[3];
    }
    return rsqrtf(block_sum(sum, partial) / dim + eps);
}

// out (n, dim) real16, what the next product reads, of x (n, dim) float32, the residual stream.
extern "C" __global__ void __launch_bounds__(256)
rms_norm(const float* x, const float* weight, float eps, real16* out, int dim) {
    const float* row = x + (size_t)blockIdx.x * dim;
    const float scale = scale_of(row, eps, dim);
    for (int i = threadIdx.x * 4; i < dim; i += blockDim.x * 4) {
        float a[4], w[4];
        load(a, row + i);
        load(w, weight + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) a[j] *= scale * w[j];
        store(out + (size_t)blockIdx.x * dim + i, a);
    }
}

// x (n, dim) float32 += that of y (n, dim) float32.
extern "C" __global__ void __launch_bounds__(256)
add_rms_norm(const float* y, const float* weight, float eps, float* x, int dim) {
    const float* row = y + (size_t)blockIdx.x * dim;
    const float scale = scale_of(row, eps, dim);
    for (int i = threadIdx.x * 4; i < dim; i += blockDim.x * 4) {
        float a[4], w[4], sum[4], *to = x + (size_t)blockIdx.x * dim + i;
        load(a, row + i);
        load(w, weight + i);
        load(sum, to);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] += a[j] * (scale * w[j]);
        store(to, sum);
    }
}
