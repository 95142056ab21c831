// Whether the residual stream is finite: bad[0] = the smallest `layer` for which some x was NaN or infinite.
//
// x (n,) float32, n a multiple of 4; bad (1,) int, set to a large number before the first layer. Grid: any number of blocks of 256.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) not_finite(const float* x, long long n, int layer, int* bad) {
    bool fine = true;
    for (long long i = (blockIdx.x * 256ll + threadIdx.x) * 4; i < n; i += gridDim.x * 1024ll) {
        float a[4];
        load(a, x + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) fine = fine && (__float_as_uint(a[j]) & 0x7f800000u) != 0x7f800000u;
    }
    if (!fine) atomicMin(bad, layer);
}
