// Whether the residual stream, or the logits, are finite: bad[0] = the smallest `layer` for which some x was NaN or infinite.
//
// x (n,) float32; bad (1,) int, set to a large number before the first layer. Grid: any number of blocks of 256.
#include "common.cuh"

__device__ __forceinline__ bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

extern "C" __global__ void __launch_bounds__(256) not_finite(const float* x, long long n, int layer, int* bad) {
    bool fine = true;
    for (long long i = (blockIdx.x * 256ll + threadIdx.x) * 4; i + 4 <= n; i += gridDim.x * 1024ll) {
        float a[4];
        load(a, x + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) fine = fine && is_finite(a[j]);
    }
    long long last = n / 4 * 4 + threadIdx.x;
    if (blockIdx.x == 0 && last < n) fine = fine && is_finite(x[last]);
    if (!fine) atomicMin(bad, layer);
}
