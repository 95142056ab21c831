// How much of the attention of given queries goes to each row of a layer, without a matrix of queries times rows.
// Defines: real16 = half, bf16; HEAD_DIM = head sizes
//
//   logit[i, r] = q_i.k_r * scale + log s_r for rows at positions q_pos[i] - window < pos[r] <= q_pos[i] (0: no window)
//   p[i, r]     = exp(logit[i, r] - lse[i])
//
// Two passes: score_lse finds what normalises each query (a prefill has it already). Then a block of window_scores
// writes p of QUERIES queries and 64 rows; a block of column_scores takes 64 rows, goes through all queries of one query
// head, the next QUERIES being copied while it works, and alone writes the sum, or the largest, of p over the queries with
// pos[r] <= q_pos[i] - min_distance.
//
// q (Hq, n, d) at q_pos (n), ascending; keys (R, d), log_size (R), pos (R): rows of the H KV heads one after another,
// those of head h from starts[h] to starts[h + 1], in any order within. Queries of the G heads of a KV head are G n
// rows that follow one another. lse (splits, Hq, n), natural log: of each split of the rows; -infinity for nothing.
#include "attention.cuh"

#define KEYS 64
#define THREADS 128
#define M (2 * QUERIES / THREADS)  // tiles of 16 queries a warp
#define N (KEYS / 8)
#define NOWHERE 0x7fffffff  // a position that no query sees

struct Keys {
    const real16* keys;
    const float* log_size;
    const int* pos;
    int n;
};

struct Bias {
    float log_size[KEYS];
    int pos[KEYS];
};

// The rows of KV head h.
__device__ __forceinline__ Keys keys_of(const real16* keys, const float* log_size, const int* pos, const int* starts,
                                        int h) {
    const int first = starts[h];
    return {keys + (size_t)first * HEAD_DIM, log_size + first, pos + first, starts[h + 1] - first};
}

// Begin to fetch KEYS rows from row `first` on.
__device__ __forceinline__ void fetch(const Keys& from, int first, real16* tile, Bias& bias) {
    copy_rows<KEYS, THREADS>(tile, from.keys + (size_t)first * HEAD_DIM, from.n - first, threadIdx.x);
    const int key = first + threadIdx.x;
    if (threadIdx.x >= KEYS) return;
    bias.log_size[threadIdx.x] = key < from.n ? from.log_size[key] : 0.f;
    bias.pos[threadIdx.x] = key < from.n ? from.pos[key] : NOWHERE;
}

// Row of this lane's values [2 h] and [2 h + 1] of s[m], among the QUERIES of the block.
__device__ __forceinline__ int row_of(int m, int h) {
    return threadIdx.x / 32 * 16 * M + m * 16 + h * 8 + (threadIdx.x & 31) / 4;
}

__device__ __forceinline__ real16* rows_of_warp(real16* tile) { return tile + threadIdx.x / 32 * 16 * M * HEAD_DIM; }

// The column, among the KEYS, of value e = 0, 1 of each half of s[m][n].
__device__ __forceinline__ int column_of(int n, int e) { return n * 8 + (threadIdx.x & 3) * 2 + e; }

// Where each of this lane's queries is, of n_rows that follow one another from `first` on, n of each head; -1 if there
// is none.
__device__ __forceinline__ void positions(int (&at)[M][2], const int* q_pos, int first, int n_rows, int n) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = first + row_of(m, h);
            at[m][h] = row < n_rows ? q_pos[row % n] : -1;
        }
}

// The log of each query's sum of exponentials, from those of the splits; 0 for none. lse: of the first query.
__device__ __forceinline__ void normalisers(float (&log_sum)[M][2], const float* lse, int first, int n_rows, int splits,
                                            size_t stride) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = first + row_of(m, h);
            float top = NEG_INF, sum = 0.f;
            for (int i = 0; i < splits && row < n_rows; ++i) top = fmaxf(top, lse[i * stride + row]);
            for (int i = 0; i < splits && top > NEG_INF; ++i)
                sum += exp2_approx((lse[i * stride + row] - top) * LOG2_E);
            log_sum[m][h] = top > NEG_INF ? top + logf(sum) : 0.f;
        }
}

// Dot products -> logits; -infinity for rows that a query does not see.
__device__ __forceinline__ void logits(float (&s)[M][N][4], const Bias& bias, const int (&at)[M][2], float scale,
                                       int window) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int pos = bias.pos[column_of(n, e)];
            const float log_size = bias.log_size[column_of(n, e)];
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const bool visible = pos <= at[m][h] && (!window || pos > at[m][h] - window);
                    float& x = s[m][n][2 * h + e];
                    x = visible ? x * scale + log_size : NEG_INF;
                }
        }
}

__device__ __forceinline__ float probability(float logit, float lse) { return exp2_approx((logit - lse) * LOG2_E); }

// Grid: (tiles of G n queries, H, splits) blocks of 4 warps; dynamic shared memory: QUERIES + 2 x 64 rows, 2 Biases.
extern "C" __global__ void __launch_bounds__(THREADS)
score_lse(const real16* q, const real16* keys, const float* log_size, const int* pos, const int* starts,
          const int* q_pos, float* lse, int n, int group, float scale, int window) {
    extern __shared__ __align__(16) unsigned char shared[];
    real16* q_tile = reinterpret_cast<real16*>(shared);
    real16* k_tile = q_tile + QUERIES * HEAD_DIM;  // [2]
    Bias* bias = reinterpret_cast<Bias*>(k_tile + 2 * KEYS * HEAD_DIM);
    const int first = blockIdx.x * QUERIES, kv = blockIdx.y, n_rows = group * n;
    const Keys from = keys_of(keys, log_size, pos, starts, kv);
    const int n_tiles = (from.n + KEYS - 1) / KEYS, splits = gridDim.z;
    const int begin = (int)((long long)n_tiles * blockIdx.z / splits);
    const int end = (int)((long long)n_tiles * (blockIdx.z + 1) / splits);

    int at[M][2];
    positions(at, q_pos, first, n_rows, n);
    Rows<M> rows;
    rows.clear();
    copy_rows<QUERIES, THREADS>(q_tile, q + ((size_t)kv * n_rows + first) * HEAD_DIM, n_rows - first, threadIdx.x);
    if (begin < end) fetch(from, begin * KEYS, k_tile + (begin & 1) * KEYS * HEAD_DIM, bias[begin & 1]);
    for (int tile = begin; tile < end; ++tile) {
        cp_async_wait_all();
        __syncthreads();  // this tile is there, and every warp is done with the one before
        const int next = tile + 1;
        if (next < end) fetch(from, next * KEYS, k_tile + (next & 1) * KEYS * HEAD_DIM, bias[next & 1]);
        float s[M][N][4];
        dot_products(s, rows_of_warp(q_tile), k_tile + (tile & 1) * KEYS * HEAD_DIM);
        logits(s, bias[tile & 1], at, scale, window);
        unsigned p[N / 2][M][4];
        rows.softmax(s, p, LOG2_E);
    }
    lse += ((size_t)blockIdx.z * gridDim.y + kv) * n_rows + first;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float factor, log_sum;
            rows.finish(m, h, 1.f, factor, log_sum);
            const int row = row_of(m, h);
            if ((threadIdx.x & 3) == 0 && first + row < n_rows) lse[row] = log_sum;
        }
}

// out (G, n, R): p, 0 where a query does not see a row.
// Grid: (tiles of the longest head's rows, tiles of G n queries, H); dynamic shared memory: QUERIES + 64 rows, a Bias.
extern "C" __global__ void __launch_bounds__(THREADS)
window_scores(const real16* q, const real16* keys, const float* log_size, const int* pos, const int* starts,
              const int* q_pos, const float* lse, float* out, int splits, int n, int group, int total, float scale,
              int window) {
    extern __shared__ __align__(16) unsigned char shared[];
    real16* q_tile = reinterpret_cast<real16*>(shared);
    real16* k_tile = q_tile + QUERIES * HEAD_DIM;
    Bias& bias = *reinterpret_cast<Bias*>(k_tile + KEYS * HEAD_DIM);
    const int first_key = blockIdx.x * KEYS, first = blockIdx.y * QUERIES, kv = blockIdx.z, n_rows = group * n;
    const Keys from = keys_of(keys, log_size, pos, starts, kv);
    if (first_key >= from.n) return;

    copy_rows<QUERIES, THREADS>(q_tile, q + ((size_t)kv * n_rows + first) * HEAD_DIM, n_rows - first, threadIdx.x);
    fetch(from, first_key, k_tile, bias);
    int at[M][2];
    positions(at, q_pos, first, n_rows, n);
    float log_sum[M][2];
    normalisers(log_sum, lse + (size_t)kv * n_rows, first, n_rows, splits, (size_t)gridDim.z * n_rows);
    cp_async_wait_all();
    __syncthreads();
    float s[M][N][4];
    dot_products(s, rows_of_warp(q_tile), k_tile);
    logits(s, bias, at, scale, window);
    out += starts[kv] + first_key;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = first + row_of(m, h);
#pragma unroll
            for (int j = 0; j < N * 2; ++j) {
                const int column = column_of(j / 2, j % 2);
                if (row < n_rows && first_key + column < from.n)
                    out[(size_t)row * total + column] =
                        probability(s[m][j / 2][2 * h + j % 2], log_sum[m][h]);
            }
        }
}

// The first of n ascending positions that is not below `limit`.
__device__ __forceinline__ int lower_bound(const int* positions, int n, long long limit) {
    int low = 0;
    while (n > 0) {
        const int middle = low + n / 2;
        if (positions[middle] < limit) {
            n -= n / 2 + 1;
            low = middle + 1;
        } else
            n /= 2;
    }
    return low;
}

// out (G, R): the sum (largest = 0) or the largest (1) of p over the queries that count.
// Grid: (tiles of the longest head's rows, Hq); dynamic shared memory: 2 QUERIES + 64 rows, a Bias.
extern "C" __global__ void __launch_bounds__(THREADS)
column_scores(const real16* q, const real16* keys, const float* log_size, const int* pos, const int* starts,
              const int* q_pos, const float* lse, float* out, int splits, int n, int group, int total, float scale,
              int window, int min_distance, int largest) {
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ float of_warp[THREADS / 32][KEYS];
    real16* k_tile = reinterpret_cast<real16*>(shared);
    real16* q_tile = k_tile + KEYS * HEAD_DIM;  // [2]
    Bias& bias = *reinterpret_cast<Bias*>(q_tile + 2 * QUERIES * HEAD_DIM);
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int first_key = blockIdx.x * KEYS, head = blockIdx.y, kv = head / group;
    const Keys from = keys_of(keys, log_size, pos, starts, kv);
    if (first_key >= from.n) return;
    q += (size_t)head * n * HEAD_DIM;
    lse += (size_t)head * n;

    fetch(from, first_key, k_tile, bias);
    __syncthreads();
    int oldest = NOWHERE, newest = -1;  // of the rows of this tile
    for (int i = 0; i < KEYS; ++i)
        if (first_key + i < from.n) {
            oldest = min(oldest, bias.pos[i]);
            newest = max(newest, bias.pos[i]);
        }
    // No other query sees a row of this tile from far enough.
    const int begin = lower_bound(q_pos, n, (long long)oldest + min_distance) / QUERIES * QUERIES;
    const int end = window ? lower_bound(q_pos, n, (long long)newest + window) : n;

    auto fetch_queries = [&](int first) {
        real16* tile = q_tile + first / QUERIES % 2 * QUERIES * HEAD_DIM;
        copy_rows<QUERIES, THREADS>(tile, q + (size_t)first * HEAD_DIM, n - first, threadIdx.x);
    };
    float of_column[N][2] = {};
    if (begin < end) fetch_queries(begin);
    for (int first = begin; first < end; first += QUERIES) {
        cp_async_wait_all();
        __syncthreads();  // these queries are there, and every warp is done with those before
        if (first + QUERIES < end) fetch_queries(first + QUERIES);
        int at[M][2];
        positions(at, q_pos, first, n, n);
        float log_sum[M][2], s[M][N][4];
        normalisers(log_sum, lse, first, n, splits, (size_t)gridDim.y * n);
        real16* tile = q_tile + first / QUERIES % 2 * QUERIES * HEAD_DIM;
        dot_products(s, rows_of_warp(tile), k_tile);
        logits(s, bias, at, scale, window);
#pragma unroll
        for (int j = 0; j < N * 2; ++j) {
            const int at_column = bias.pos[column_of(j / 2, j % 2)];
            float& of = of_column[j / 2][j % 2];
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const bool counts = at_column <= at[m][h] - min_distance;
                    const float logit = s[m][j / 2][2 * h + j % 2];
                    const float p = counts ? probability(logit, log_sum[m][h]) : 0.f;
                    of = largest ? fmaxf(of, p) : of + p;
                }
        }
    }
#pragma unroll
    for (int j = 0; j < N * 2; ++j) {
        float x = of_column[j / 2][j % 2];
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {  // over the lanes with other rows of the same column
            const float other = __shfl_xor_sync(FULL_MASK, x, step);
            x = largest ? fmaxf(x, other) : x + other;
        }
        if (lane < 4) of_warp[warp][column_of(j / 2, j % 2)] = x;
    }
    __syncthreads();
    if (threadIdx.x < KEYS && first_key + threadIdx.x < from.n) {
        float x = of_warp[0][threadIdx.x];
        for (int i = 1; i < THREADS / 32; ++i) {
            const float other = of_warp[i][threadIdx.x];
            x = largest ? fmaxf(x, other) : x + other;
        }
        out[(size_t)(head % group) * total + starts[kv] + first_key + threadIdx.x] = x;
    }
}
