// A Plan: entry e = the sum of weight[r] * rows[r] over its rows r = order[first[e]], ..., order[first[e + 1] - 1].
// Defines: real16 = half, bf16; HEAD_DIM = head sizes
//
// rows (R, d) and out (E, d) real16; sums are float32, in the order given, so that the result is the same every time. An
// entry that is one row of weight 1 (and, for keys, of the same position) is that row, bit for bit.
// Grid: a team an entry, 256 threads a block.
#include "rows.cuh"

extern "C" __global__ void __launch_bounds__(256)
merge(const real16* rows, const int* order, const int* first, const float* weight, real16* out, int n_entries) {
    int entry = (blockIdx.x * blockDim.x + threadIdx.x) / TEAM, i = threadIdx.x % TEAM * 8;
    if (entry >= n_entries || i >= D) return;
    float sum[8] = {};
    for (int at = first[entry]; at < first[entry + 1]; ++at) {
        int row = order[at];
        float x[8], w = weight[row];
        load(x, rows + (size_t)row * D + i);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[j] = fmaf(w, x[j], sum[j]);
    }
    store(out + (size_t)entry * D + i, sum);
}

// Keys: summed with their rotation undone (unrotated (R, d)), and the sum is turned to the position of the entry. pos (R,),
// entry_pos (E,); cos, sin (positions, d/2). A thread holds elements i .. i + 3 of both halves.
extern "C" __global__ void __launch_bounds__(256)
merge_unrotated(const real16* rows, const real16* unrotated, const int* pos, const int* order, const int* first,
                const float* weight, const int* entry_pos, const float* cos, const float* sin, real16* out, int n_entries) {
    int entry = (blockIdx.x * blockDim.x + threadIdx.x) / TEAM, i = threadIdx.x % TEAM * 4;
    if (entry >= n_entries || i >= HALF) return;
    int begin = first[entry], end = first[entry + 1], to = entry_pos[entry];
    real16* y = out + (size_t)entry * D + i;
    if (end - begin == 1 && weight[order[begin]] == 1.f && pos[order[begin]] == to) {
        const real16* x = rows + (size_t)order[begin] * D + i;
        *reinterpret_cast<uint2*>(y) = *reinterpret_cast<const uint2*>(x);
        *reinterpret_cast<uint2*>(y + HALF) = *reinterpret_cast<const uint2*>(x + HALF);
        return;
    }
    float low[4] = {}, high[4] = {}, a[4], b[4], c[4], s[4];
    for (int at = begin; at < end; ++at) {
        int row = order[at];
        load(a, unrotated + (size_t)row * D + i);
        load(b, unrotated + (size_t)row * D + HALF + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            low[j] = fmaf(weight[row], a[j], low[j]);
            high[j] = fmaf(weight[row], b[j], high[j]);
        }
    }
    load(c, cos + (size_t)to * HALF + i);
    load(s, sin + (size_t)to * HALF + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        a[j] = low[j] * c[j] - high[j] * s[j];
        b[j] = high[j] * c[j] + low[j] * s[j];
    }
    store(y, a);
    store(y + HALF, b);
}
