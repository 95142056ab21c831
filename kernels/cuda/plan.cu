// What a Plan is made of beside keys and values: counts, sums over groups of rows, neighbours. Every result is the same
// every time: sums are of whole numbers or have an order. Blocks of 256 threads.
#include "common.cuh"

static const int THREADS = 256, OWN = 8;  // rows that a thread numbers

// counts (S,): how many of mask[first[s] : first[s + 1]] are true; first NULL: of every OWN * THREADS rows of (n,). Grid:
// a block a segment.
extern "C" __global__ void __launch_bounds__(256)
segment_count(const unsigned char* mask, const int* first, int* counts, int n) {
    __shared__ int total;
    int segment = blockIdx.x, own = 0, begin = segment * OWN * THREADS, end = min(begin + OWN * THREADS, n);
    if (first) begin = first[segment], end = first[segment + 1];
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    for (int i = begin + threadIdx.x; i < end; i += THREADS) own += mask[i] != 0;
    atomicAdd(&total, own);
    __syncthreads();
    if (threadIdx.x == 0) counts[segment] = total;
}

// rows: where mask (n,) is true, in order; number (n,): the how-manieth of them each is, from 0, or -1. `before`: of
// every OWN * THREADS rows how many are true, which segment_count has found. Grid: so many rows a block.
extern "C" __global__ void __launch_bounds__(256)
compact(const unsigned char* mask, const int* before, int* rows, int* number, int n) {
    __shared__ int base, sums[THREADS];
    int thread = threadIdx.x, begin = (blockIdx.x * THREADS + thread) * OWN, own = 0, blocks = 0;
    if (thread == 0) base = 0;
    __syncthreads();
    for (int i = thread; i < blockIdx.x; i += THREADS) blocks += before[i];
    atomicAdd(&base, blocks);
    for (int i = begin; i < min(begin + OWN, n); ++i) own += mask[i] != 0;
    int at = block_scan(own, sums) - own + base;
    for (int i = begin; i < min(begin + OWN, n); ++i) {
        number[i] = mask[i] ? at : -1;
        if (mask[i]) rows[at++] = i;
    }
}

// out (E,): the sum of values (R,) over the rows of each group: order[first[e]], ..., order[first[e + 1] - 1].
// Grid: a group a thread.
extern "C" __global__ void __launch_bounds__(256)
segment_sum(const double* values, const int* order, const int* first, double* out, int n_groups) {
    int group = blockIdx.x * blockDim.x + threadIdx.x;
    if (group >= n_groups) return;
    double sum = 0;
    for (int at = first[group]; at < first[group + 1]; ++at) sum += values[order[at]];
    out[group] = sum;
}

// out (R,): the largest, or the mean (zeros beyond the ends count), of `width` neighbours of each of scores (R,) in its
// segment: width / 2 before it, itself, and the others after it. Grid: a row a thread.
extern "C" __global__ void __launch_bounds__(256)
pooled(const float* scores, const int* first, float* out, int n_segments, int n_rows, int width, int largest) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= n_rows) return;
    int segment = segment_of(row, first, n_segments), from = row - width / 2;
    float x = largest ? NEG_INF : 0.f;
    for (int i = max(from, first[segment]); i < min(from + width, first[segment + 1]); ++i)
        x = largest ? fmaxf(x, scores[i]) : x + scores[i];
    out[row] = largest ? x : x / width;
}

// out (R,): of the rows of the same segment that stay (R,), the one nearest to each row within `reach` positions, of two
// as near the earlier; or -1. pos (R,) ascend within a segment. Grid: a row a thread.
extern "C" __global__ void __launch_bounds__(256)
neighbours(const unsigned char* stays, const int* pos, const int* first, int* out, int n_segments, int n_rows, int reach) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= n_rows) return;
    int segment = segment_of(row, first, n_segments), begin = first[segment], end = first[segment + 1], at = pos[row];
    int before = row - 1, after = row + 1;
    while (before >= begin && !stays[before] && at - pos[before] <= reach) --before;
    while (after < end && !stays[after] && pos[after] - at <= reach) ++after;
    int far = before >= begin && stays[before] ? at - pos[before] : reach + 1;
    int farther = after < end && stays[after] ? pos[after] - at : reach + 1;
    out[row] = min(far, farther) > reach ? -1 : far <= farther ? before : after;
}
