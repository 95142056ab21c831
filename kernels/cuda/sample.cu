// The next token of each of B sequences: greedy, or drawn at a temperature from what top-k, top-p and min-p leave, each of
// them of what the one before left, after a penalty on repetition. minillm/sampling.py is the specification: tokens are ranked by
// logit, of equal ones the lower id first, and `uniform` in [0, 1) picks the first id at which the sum of the weights, in the
// order of ids, is more than that share of it. Sums are of doubles in an order that depends on nothing but vocab.
//
// logits (B, vocab) float32, which the penalty changes; reals (B, 5) double and ints (B, 66) int: how each token is drawn, columns as
// below; best (B, parts): the first token in the ranking of each part of the vocabulary; weights (B, vocab) double; tokens (B,) int.
#include "common.cuh"

typedef unsigned long long Rank;  // compares as the ranking does: the logit's key, and below it the id's complement
enum { TEMPERATURE, TOP_P, MIN_P, UNIFORM, PENALTY, N_REALS };
enum { TOP_K, N_RECENT, RECENT, N_INTS = RECENT + 64 };  // the ids that the penalty is for, each once, are the last of the row
static const int THREADS = 512, WARPS = THREADS / 32, DIGIT_BITS = 4;  // of sample_draw: a warp for each value of a digit

// A number that compares as the float does; -0 is 0.
__device__ __forceinline__ unsigned key_of(float x) {
    unsigned bits = __float_as_uint(x + 0.f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float logit_of(unsigned key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

__device__ __forceinline__ Rank first_of(const Rank* best, int parts) {
    Rank first = 0;
    for (int i = 0; i < parts; ++i) first = max(first, best[i]);
    return first;
}

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(FULL_MASK, x, offset);
    return x;
}

// The penalty, and the first in the ranking of each part. Grid (parts, B).
extern "C" __global__ void __launch_bounds__(256)
sample_best(float* logits, const double* reals, const int* ints, unsigned long long* best, int vocab) {
    __shared__ Rank of_warp[8];
    int b = blockIdx.y, size = (vocab + gridDim.x - 1) / gridDim.x, lo = blockIdx.x * size, hi = min(lo + size, vocab);
    float* row = logits + (size_t)b * vocab;
    float penalty = (float)reals[b * N_REALS + PENALTY];
    ints += b * N_INTS;
    for (int i = threadIdx.x; i < ints[N_RECENT]; i += blockDim.x) {
        int id = ints[RECENT + i];
        if (lo <= id && id < hi) row[id] = row[id] > 0.f ? row[id] / penalty : row[id] * penalty;
    }
    __syncthreads();
    Rank first = 0;
    for (int id = lo + threadIdx.x; id < hi; id += blockDim.x) first = max(first, (Rank)key_of(row[id]) << 32 | ~(unsigned)id);
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) first = max(first, __shfl_xor_sync(FULL_MASK, first, offset));
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = first;
    __syncthreads();
    if (threadIdx.x == 0) best[b * gridDim.x + blockIdx.x] = first_of(of_warp, 8);
}

// weights = exp((logit - the largest) / temperature), where that is not 0. Grid (parts, B).
extern "C" __global__ void __launch_bounds__(256)
sample_weights(const float* logits, const double* reals, const unsigned long long* best, double* weights, int vocab) {
    double temperature = reals[blockIdx.y * N_REALS + TEMPERATURE];
    if (temperature == 0.) return;
    size_t row = (size_t)blockIdx.y * vocab;
    double largest = logit_of(first_of(best + blockIdx.y * gridDim.x, gridDim.x) >> 32);
    for (int id = blockIdx.x * 256 + threadIdx.x; id < vocab; id += gridDim.x * 256)
        weights[row + id] = exp((logits[row + id] - largest) / temperature);
}

// A row of logits and a block's work on it. A measure is a function of the id, not negative; what it adds up to decides where
// something ends. Results are in all threads.
struct Row {
    const float* logits;
    int vocab;
    double *bins, *sums;  // shared: (1 << DIGIT_BITS, THREADS), (WARPS,)
    int* found;           // shared

    // The measure of all ids. sums[w]: of the ids of warp w, which lie one after another.
    template <class Measure>
    __device__ double all(Measure measure) {
        int size = (vocab + WARPS - 1) / WARPS, warp = threadIdx.x / 32, end = min((warp + 1) * size, vocab);
        double sum = 0.;
        for (int id = warp * size + threadIdx.x % 32; id < end; id += 32) sum += measure(id);
        sum = warp_sum(sum);
        __syncthreads();  // sums of before have been read
        if (threadIdx.x % 32 == 0) sums[warp] = sum;
        __syncthreads();
        double total = 0.;
        for (int w = 0; w < WARPS; ++w) total += sums[w];
        return total;
    }

    // The first id at which the measure of the ids up to it is more than `goal`, or the last id that has any. all() of the
    // same measure goes before.
    template <class Measure>
    __device__ int beyond(Measure measure, double goal) {
        double before = 0., upto = 0.;
        int chosen = 0;
        for (int w = 0; w < WARPS && !(upto > goal); ++w)
            if (sums[w] > 0.) chosen = w, before = upto, upto += sums[w];
        if (threadIdx.x / 32 == chosen) {
            int size = (vocab + WARPS - 1) / WARPS, lane = threadIdx.x % 32, end = min((chosen + 1) * size, vocab);
            int last = min(chosen * size, vocab - 1);
            for (int id = chosen * size; id < end; id += 32) {
                double mine = id + lane < end ? measure(id + lane) : 0., sum = mine;
                for (int offset = 1; offset < 32; offset <<= 1) {
                    double other = __shfl_up_sync(FULL_MASK, sum, offset);
                    if (lane >= offset) sum += other;
                }
                unsigned some = __ballot_sync(FULL_MASK, mine > 0.);
                unsigned past = __ballot_sync(FULL_MASK, mine > 0. && before + sum > goal);
                if (some) last = id + 31 - __clz(some);
                if (past) {
                    last = id + __ffs(past) - 1;
                    break;
                }
                before += __shfl_sync(FULL_MASK, sum, 31);
            }
            if (lane == 0) *found = last;
        }
        __syncthreads();
        return *found;
    }

    // The shortest beginning of the ranking whose measure reaches goal > 0: what ranks above `key`, and of those with this
    // key the ids up to `last`. The key is found digit by digit; in bins each thread adds up what it sees, digit by digit.
    template <class Measure>
    __device__ void reach(Measure measure, double goal, unsigned& key, int& last) {
        unsigned prefix = 0;
        double above = 0., equal = 0.;  // measure of what ranks above the prefix, and of what has it
        for (int shift = 32 - DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
            for (int digit = 0; digit < 1 << DIGIT_BITS; ++digit) bins[digit * THREADS + threadIdx.x] = 0.;
            for (int id = threadIdx.x; id < vocab; id += THREADS) {
                unsigned digit = (key_of(logits[id]) ^ prefix) >> shift;
                if (digit < 1 << DIGIT_BITS) bins[digit * THREADS + threadIdx.x] += measure(id);
            }
            __syncthreads();
            double sum = 0.;
            for (int i = threadIdx.x % 32; i < THREADS; i += 32) sum += bins[threadIdx.x / 32 * THREADS + i];
            sum = warp_sum(sum);
            if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
            __syncthreads();
            double upto = above;
            unsigned chosen = 0;
            for (int digit = (1 << DIGIT_BITS) - 1; digit >= 0 && upto < goal; --digit)
                if (sums[digit] > 0.) chosen = digit, above = upto, equal = sums[digit], upto += equal;
            prefix |= chosen << shift;
        }
        auto tie = [&](int id) { return key_of(logits[id]) == prefix ? 1. : 0.; };
        double ties = all(tie), needed = ceil((goal - above) / (equal / ties));
        last = beyond(tie, fmin(fmax(needed, 1.), ties) - 0.5);
        key = prefix;
    }
};

// tokens[b] from the logits and weights of row b. Grid: B blocks. Shared: the bins.
extern "C" __global__ void __launch_bounds__(THREADS)
sample_draw(const float* logits, const double* weights, const double* reals, const int* ints, const unsigned long long* best,
            int* tokens, int vocab, int parts) {
    extern __shared__ double bins[];
    __shared__ double sums[WARPS];
    __shared__ int found;
    int b = blockIdx.x;
    reals += b * N_REALS;
    if (reals[TEMPERATURE] == 0.) {
        if (threadIdx.x == 0) tokens[b] = ~(unsigned)first_of(best + b * parts, parts);
        return;
    }
    logits += (size_t)b * vocab, weights += (size_t)b * vocab;
    Row row = {logits, vocab, bins, sums, &found};
    unsigned key = 0;
    int last = vocab, top_k = ints[b * N_INTS + TOP_K];
    auto weight = [&](int id) {
        unsigned own = key_of(logits[id]);
        return own > key || (own == key && id <= last) ? weights[id] : 0.;
    };
    if (0 < top_k && top_k < vocab) row.reach([](int) { return 1.; }, top_k, key, last);
    if (reals[TOP_P] < 1.) row.reach([&](int id) { return weights[id]; }, reals[TOP_P] * row.all(weight), key, last);
    auto likely = [&](int id) {
        double w = weight(id);
        return w >= reals[MIN_P] ? w : 0.;  // the most likely token has weight 1
    };
    int token = row.beyond(likely, reals[UNIFORM] * row.all(likely));
    if (threadIdx.x == 0) tokens[b] = token;
}
