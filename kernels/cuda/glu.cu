// out = activated(gate) * up, elementwise.
// Defines: real16 = half, bf16
//
// gate_up (n, 2 ffn) real16: gate and up of a row side by side, as the product with both in one matrix gives them; bias
// (2 ffn,) float32 or null; out (n, ffn) real16. Grid (n, blocks of 256 threads over ffn / 8); ffn: a multiple of 8.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256)
glu(const real16* gate_up, const float* bias, real16* out, int ffn, float linear, float cubic) {
    int i = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (i >= ffn) return;
    const real16* row = gate_up + (size_t)blockIdx.x * 2 * ffn;
    float gate[8], up[8];
    load(gate, row + i);
    load(up, row + ffn + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        float g = gate[j] + (bias ? bias[i + j] : 0.f), u = up[j] + (bias ? bias[ffn + i + j] : 0.f);
        gate[j] = activated(g, linear, cubic) * u;
    }
    store(out + (size_t)blockIdx.x * ffn + i, gate);
}
