// Random weights: out[i] uniform in [-bound, bound), a hash of seed and i, so that they do not depend on the grid.
// Defines: real16 = half, bf16
//
// out (n,) real16. Grid: any number of blocks of 256 threads. Hash: the finaliser of MurmurHash3 (Appleby, 2011).
#include "common.cuh"

__device__ __forceinline__ unsigned long long mixed(unsigned long long x) {
    x = (x ^ x >> 33) * 0xff51afd7ed558ccdull;
    x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53ull;
    return x ^ x >> 33;
}

extern "C" __global__ void __launch_bounds__(256)
random_words(real16* out, long long n, unsigned long long seed, float bound) {
    for (long long i = blockIdx.x * 256ll + threadIdx.x; i < n; i += gridDim.x * 256ll) {
        unsigned bits = (unsigned)(mixed(mixed(seed) + i) >> 40);  // 24 of them
        out[i] = from_float<real16>(bound * (bits * (2.f / (1 << 24)) - 1.f));
    }
}
