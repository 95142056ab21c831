// out (n, d) = rows index (n,) of rows (R, d), 16-bit words. d: a multiple of 8. Grid: blocks of 256 threads, 16 bytes each.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256)
take(const unsigned short* rows, const int* index, unsigned short* out, int d, int n) {
    int thread = blockIdx.x * blockDim.x + threadIdx.x, row = thread / (d / 8), i = thread % (d / 8);
    if (row >= n) return;
    size_t from = (size_t)index[row] * (d / 8) + i, to = (size_t)row * (d / 8) + i;
    reinterpret_cast<uint4*>(out)[to] = reinterpret_cast<const uint4*>(rows)[from];
}
