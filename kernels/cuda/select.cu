// The largest scores of each of some segments, of equal ones the earlier: a radix select, 11 bits of the keys a launch.
//
// scores (R,); segment s is scores[first[s] : first[s + 1]], and counts[s] of it are taken. A key is the score's bits as
// floats are ordered and below them, in `low` bits, how far the row is from the end of the segment: no two of a segment
// are the same. After `pass` launches, the first digits of `from` (passes + 1, S) are those of the last key that is
// taken: of the keys that begin like it `left` (passes + 1, S) are, and of greater ones all; where left is 0 `from` is
// whole. histograms (passes, S, BINS), zero at the start. Sums are of whole numbers: the same every time.
// Grid: blocks of 256 threads x segments.
#include "common.cuh"

static const int DIGIT = 11, BINS = 1 << DIGIT, THREADS = 256, OWN = BINS / THREADS;

struct State { unsigned long long from; int left; };

__device__ __forceinline__ unsigned long long key_of(float score, int i, int low) {
    unsigned bits = __float_as_uint(score + 0.f);  // -0 is 0
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (unsigned long long)bits << low | ((1u << low) - 1 - i);
}

// What is known after `pass` digits, in all threads of the block.
__device__ __forceinline__ State state_after(int pass, int passes, int n, int count, const unsigned* histograms,
                                             const unsigned long long* from, const int* left) {
    __shared__ int sums[THREADS], found[3];
    int segment = blockIdx.y, n_segments = gridDim.y, thread = threadIdx.x;
    if (pass == 0) {
        State state = {count > 0 ? 0ull : ~0ull, count < n && count > 0 ? count : 0};
        return state;
    }
    State state = {from[(pass - 1) * n_segments + segment], left[(pass - 1) * n_segments + segment]};
    if (state.left == 0) return state;
    const unsigned* bins = histograms + ((size_t)(pass - 1) * n_segments + segment) * BINS;
    int top = BINS - 1 - thread * OWN, own = 0;  // a thread has the bins top, top - 1, ...
    for (int i = 0; i < OWN; ++i) own += bins[top - i];
    int upto = block_scan(own, sums), above = upto - own;
    if (above < state.left && state.left <= upto) {
        int bin = top;
        while (above + (int)bins[bin] < state.left) above += bins[bin--];
        found[0] = bin;
        found[1] = above;
        found[2] = bins[bin];
    }
    __syncthreads();
    state.from |= (unsigned long long)found[0] << DIGIT * (passes - pass);
    state.left -= found[1];
    if (state.left == found[2]) state.left = 0;  // all that begin like it
    return state;
}

extern "C" __global__ void __launch_bounds__(256)
select_digit(const float* scores, const int* first, const int* counts, unsigned* histograms, unsigned long long* from,
             int* left, int low, int passes, int pass) {
    __shared__ unsigned bins[BINS];
    int segment = blockIdx.y, begin = first[segment], n = first[segment + 1] - begin;
    State state = state_after(pass, passes, n, counts[segment], histograms, from, left);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        from[pass * gridDim.y + segment] = state.from;
        left[pass * gridDim.y + segment] = state.left;
    }
    if (state.left == 0) return;
    for (int i = threadIdx.x; i < BINS; i += THREADS) bins[i] = 0;
    __syncthreads();
    int shift = DIGIT * (passes - 1 - pass);
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < n; i += gridDim.x * THREADS) {
        unsigned long long key = key_of(scores[begin + i], i, low);
        if (pass == 0 || (key ^ state.from) >> (shift + DIGIT) == 0) atomicAdd(bins + (key >> shift) % BINS, 1u);
    }
    __syncthreads();
    unsigned* out = histograms + ((size_t)pass * gridDim.y + segment) * BINS;
    for (int i = threadIdx.x; i < BINS; i += THREADS)
        if (bins[i]) atomicAdd(out + i, bins[i]);
}

extern "C" __global__ void __launch_bounds__(256)
select_mask(const float* scores, const int* first, const int* counts, const unsigned* histograms,
            const unsigned long long* from, const int* left, unsigned char* taken, int low, int passes) {
    int segment = blockIdx.y, begin = first[segment], n = first[segment + 1] - begin;
    State state = state_after(passes, passes, n, counts[segment], histograms, from, left);
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < n; i += gridDim.x * THREADS)
        taken[begin + i] = key_of(scores[begin + i], i, low) >= state.from;
}
