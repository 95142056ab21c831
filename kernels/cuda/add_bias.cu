// x (n, dim) float32 += bias (dim,): the output bias of attention or MLP, in the few models that have one.
// Grid (n, blocks of 256 threads over dim).
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) add_bias(float* x, const float* bias, int dim) {
    int i = blockIdx.y * blockDim.x + threadIdx.x;
    if (i < dim) x[(size_t)blockIdx.x * dim + i] += bias[i];
}
