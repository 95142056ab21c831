// Greedy seed-based clustering (SemantiCache, algorithm 1) of many segments at once, for a grid of taus.
// Defines: real16 = half, bf16; HEAD_DIM = head sizes
//
// Segment m is rows starts[m] : starts[m] + lengths[m] of unit (C, d) float32. Scanning it, a row without a cluster becomes
// a seed and absorbs every later free row whose cosine with the seed is greater than tau. What is computed for one tau
// does not depend on the others: grid y is the tau. Results: counts (taus,) int, clusters of all segments together, and,
// unless seed is null, seed (taus, C) int (the seed's row) and similarity (taus, C) float (1 for seeds).
//
// Short segments keep the cosines of all pairs, `place[m]` into `kept` (L x L, the upper half is meant), and a warp scans
// one; a lane holds the bits of 32 free rows at a time, so L <= 1024. Long ones (place -1) are a block's work, which
// computes the cosines of a seed when it has found one.
#include "rows.cuh"

static const int LONG_THREADS = 256;

// unit (C, d) = keys (C, d), each over its norm; 0 for a row of norm zero. Grid: a warp a row, 8 a block.
extern "C" __global__ void __launch_bounds__(256)
unit_rows(const real16* keys, float* unit, int n) {
    int row = (blockIdx.x * blockDim.x + threadIdx.x) >> 5;
    if (row >= n) return;
    WarpRow key(keys + (size_t)row * D);
    float sum = key.dot(key), scale = sum > 0.f ? 1.f / sqrtf(sum) : 0.f;
#pragma unroll
    for (int p = 0; p < WarpRow::PARTS; ++p) {
#pragma unroll
        for (int i = 0; i < WarpRow::WIDE; ++i) key.x[p][i] *= scale;
        if (WarpRow::element(p) < D) store(unit + (size_t)row * D + WarpRow::element(p), key.x[p]);
    }
}

// kept[place[m] + i * L + j] = cosine of rows i < j of segment m. Grid: a warp a segment; a lane holds row j in registers, or
// a half of it at a time.
static const int HALVES = D > 128 ? 2 : 1, HELD = D / HALVES;  // elements of a row

extern "C" __global__ void __launch_bounds__(128)
keep_cosines(const float* unit, const int* starts, const int* lengths, const long long* place, float* kept, int n_segments) {
    int m = (blockIdx.x * blockDim.x + threadIdx.x) >> 5, lane = threadIdx.x & 31;
    if (m >= n_segments || place[m] < 0) return;
    int L = lengths[m];
    const float* rows = unit + (size_t)starts[m] * D;
    float* out = kept + place[m];
    for (int item = 0; item < (L + 31) / 32 * HALVES; ++item) {
        int tile = item / HALVES * 32, first = item % HALVES * HELD, j = tile + lane;
        float mine[HELD];
#pragma unroll
        for (int i = 0; i < HELD; i += 4) {
            float part[4];
            load(part, rows + (size_t)min(j, L - 1) * D + first + i);
            mine[i] = part[0], mine[i + 1] = part[1], mine[i + 2] = part[2], mine[i + 3] = part[3];
        }
        for (int i = 0; i < min(tile + 31, L); ++i) {
            bool kept_one = i < j && j < L;
            float* to = out + (size_t)i * L + j;
            float dot = first && kept_one ? *to : 0.f;
#pragma unroll
            for (int part = 0; part < HELD; part += 4) {
                float other[4];
                load(other, rows + (size_t)i * D + first + part);
                dot += mine[part] * other[0] + mine[part + 1] * other[1] + mine[part + 2] * other[2] + mine[part + 3] * other[3];
            }
            if (kept_one) *to = first + HELD < D ? dot : fminf(dot, 1.f);
        }
    }
}

// Grid (blocks of 4 warps over the segments, taus).
extern "C" __global__ void __launch_bounds__(128)
short_clusters(const float* kept, const int* starts, const int* lengths, const long long* place, const float* taus,
               int* counts, int* seed, float* similarity, int n_segments, int n_rows) {
    int m = (blockIdx.x * blockDim.x + threadIdx.x) >> 5, lane = threadIdx.x & 31;
    if (m >= n_segments || place[m] < 0) return;
    int L = lengths[m], words = (L + 31) / 32, n_clusters = 0;
    const float* cosines = kept + place[m];
    float tau = taus[blockIdx.y];
    size_t base = (size_t)blockIdx.y * n_rows + starts[m];
    unsigned free_rows = lane < words - 1 ? FULL_MASK : lane == words - 1 ? FULL_MASK >> (32 * words - L) : 0u;  // word `lane`
    for (int i = 0; i < L; ++i) {
        if (!(__shfl_sync(FULL_MASK, free_rows, i / 32) >> (i % 32) & 1)) continue;
        ++n_clusters;
        for (int word = i / 32; word < words; ++word) {
            int j = word * 32 + lane;
            bool is_free = __shfl_sync(FULL_MASK, free_rows, word) >> lane & 1;
            float cosine = is_free && j > i ? cosines[(size_t)i * L + j] : NEG_INF;
            bool taken = cosine > tau || (is_free && j == i);
            unsigned absorbed = __ballot_sync(FULL_MASK, taken);
            if (lane == word) free_rows &= ~absorbed;
            if (taken && seed) {
                seed[base + j] = starts[m] + i;
                similarity[base + j] = j == i ? 1.f : cosine;
            }
        }
    }
    if (lane == 0) atomicAdd(counts + blockIdx.y, n_clusters);
}

// Grid (segments, taus); a block for each long segment. taken (taus, C) unsigned char, zero before.
extern "C" __global__ void __launch_bounds__(LONG_THREADS)
long_clusters(const float* unit, const int* starts, const int* lengths, const long long* place, const float* taus,
              int* counts, int* seed, float* similarity, unsigned char* taken, int n_rows) {
    int m = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_clusters = 0;
    if (place[m] >= 0) return;
    int L = lengths[m];
    const float* rows = unit + (size_t)starts[m] * D;
    float tau = taus[blockIdx.y];
    size_t base = (size_t)blockIdx.y * n_rows + starts[m];
    unsigned char* gone = taken + base;
    for (int i = 0; i < L; ++i) {
        bool absorbed = gone[i];  // written before the last __syncthreads
        if (absorbed) continue;
        ++n_clusters;
        const WarpRow mine(rows + (size_t)i * D);
        if (threadIdx.x == 0 && seed) seed[base + i] = starts[m] + i, similarity[base + i] = 1.f;
#pragma unroll 1
        for (int j = i + 1 + warp; j < L; j += LONG_THREADS / 32) {
            if (gone[j]) continue;  // only this warp writes gone[j] for this seed
            float dot = fminf(mine.dot(WarpRow(rows + (size_t)j * D)), 1.f);
            if (dot > tau && lane == 0) {
                gone[j] = 1;
                if (seed) seed[base + j] = starts[m] + i, similarity[base + j] = dot;
            }
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) atomicAdd(counts + blockIdx.y, n_clusters);
}
