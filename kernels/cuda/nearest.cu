// For each of some rows the one most like it of a segment of others, by the cosine of their keys.
// Defines: real16 = half, bf16; HEAD_DIM = head sizes
//
// keys (R, d) real16; rows (n,), others (m,): numbers of rows. rows[i] looks among others[first[i]], ..., others[last[i] - 1].
// found (n,): number of the row, of equal ones the first in `others`, -1 where the segment is empty; cosine (n,), 0 for none and
// for keys of norm zero. Grid: a warp to each of the n, 8 a block.
#include "rows.cuh"

extern "C" __global__ void __launch_bounds__(256)
nearest(const real16* keys, const int* rows, const int* others, const int* first, const int* last, int* found, float* cosine, int n) {
    int i = (blockIdx.x * blockDim.x + threadIdx.x) >> 5, lane = threadIdx.x & 31, which = -1;
    if (i >= n) return;
    const WarpRow mine(keys + (size_t)rows[i] * D);
    float own = mine.dot(mine), best = NEG_INF;
    for (int at = first[i]; at < last[i]; ++at) {
        const WarpRow other(keys + (size_t)others[at] * D);
        float dot = mine.dot(other), square = other.dot(other);
        float alike = square * own > 0.f ? dot / (sqrtf(square) * sqrtf(own)) : 0.f;
        if (alike > best) best = alike, which = others[at];
    }
    if (lane == 0) found[i] = which, cosine[i] = which < 0 ? 0.f : best;
}
