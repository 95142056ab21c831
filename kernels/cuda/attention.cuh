// One step of FlashAttention-2 (Dao 2023, algorithm 1) on tiles in shared memory, for decode, prefill and scores.
//
// A tile holds rows of ROW words, HEAD_DIM where nothing else is said, in chunks of 16 bytes.
#pragma once
#include "mma.cuh"
#include "rows.cuh"

#define LOG2_E 1.4426950408889634f

constexpr int CHUNKS = HEAD_DIM / 8;  // of 16-bit values

// Chunk `chunk` + `odd` of a row; odd: 0, or 0 or 1 after an even chunk. Chunks are permuted within groups, of 8 or of the
// largest power of two that divides a row: the same chunk of 8 rows that follow one another, which is what ldmatrix reads
// at a time, lies in 8 groups of 4 banks.
template <int ROW = HEAD_DIM, class T>
__device__ __forceinline__ T* chunk_at(T* tile, int row, int chunk, int odd = 0) {
    constexpr int SIZE = 16 / sizeof(T), IN_ROW = ROW / SIZE, GROUP = (IN_ROW | 8) & -(IN_ROW | 8);
    const int mixed = (chunk % GROUP + odd) ^ (row / (8 / GROUP) % GROUP);
    return tile + row * ROW + (chunk / GROUP * GROUP + mixed) * SIZE;
}

// Begin to copy N_ROWS rows that follow one another into a tile. Rows from n_there on become zeros and are not read.
// Thread `index` of N_THREADS does its share.
template <int N_ROWS, int N_THREADS, int ROW = HEAD_DIM, class T>
__device__ __forceinline__ void copy_rows(T* tile, const T* rows, int n_there, int index) {
    constexpr int SIZE = 16 / sizeof(T), IN_ROW = ROW / SIZE;
#pragma unroll 2
    for (int i = index; i < N_ROWS * IN_ROW; i += N_THREADS) {
        const int row = i / IN_ROW, chunk = i % IN_ROW;
        cp_async<16>(chunk_at<ROW>(tile, row, chunk), rows + row * ROW + chunk * SIZE, row < n_there);
    }
}

template <int M, int N>
__device__ __forceinline__ void clear(float (&s)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) s[m][n][i] = 0.f;
}

// s = Q K^T for 16 M rows of Q and 8 N rows of K, both tiles.
template <int M, int N>
__device__ __forceinline__ void dot_products(float (&s)[M][N][4], real16* q, real16* k) {
    const int lane = threadIdx.x & 31;
    clear(s);
#pragma unroll 2  // more, and 128 x 64 x 128 does not fit into 255 registers
    for (int step = 0; step < HEAD_DIM / 16; ++step) {
        unsigned a[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) ldmatrix_x4(a[m], chunk_at(q, m * 16 + (lane & 15), step * 2, lane >> 4));
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            unsigned b[4];
            ldmatrix_x4(b, chunk_at(k, n * 8 + (lane >> 4) * 8 + (lane & 7), step * 2, lane >> 3 & 1));
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma_16816<real16>(s[m][n], a[m], b);
                mma_16816<real16>(s[m][n + 1], a[m], b + 2);
            }
        }
    }
}

// What `softmax` multiplies p by on its way to V, unless something else is said.
struct Unscaled {
    __device__ __forceinline__ float operator()(int, int) const { return 1.f; }
};

// The state of 16 M rows of queries of a warp. A lane's values [0..1] belong to row g, [2..3] to row g + 8 of each 16.
template <int M>
struct Rows {
    float o[M][CHUNKS][4];  // sum of p v
    float max[M][2];        // of the dot products seen
    float sum[M][2];        // of p, of this lane's columns only

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int m = 0; m < M; ++m) {
            max[m][0] = max[m][1] = NEG_INF;
            sum[m][0] = sum[m][1] = 0.f;
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) o[m][c][0] = o[m][c][1] = o[m][c][2] = o[m][c][3] = 0.f;
        }
    }

    // Begin to add 8 N keys: s, their dot products with the queries (-infinity: not visible), becomes p = exp(scale
    // (s - max)) in 16 bits, in the layout of A. scale_log2 = scale / ln 2 > 0. The sum is of p, and what meets the values
    // is p * v_scale(n, i), of key n * 8 + 2t + i.
    template <int N, class Scale = Unscaled>
    __device__ __forceinline__ void softmax(float (&s)[M][N][4], unsigned (&p)[N / 2][M][4], float scale_log2,
                                            const Scale& v_scale = {}) {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float top = max[m][h];
#pragma unroll
                for (int n = 0; n < N; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
                top = fmaxf(top, __shfl_xor_sync(FULL_MASK, top, 1));
                top = fmaxf(top, __shfl_xor_sync(FULL_MASK, top, 2));
                const float base = top == NEG_INF ? 0.f : top * scale_log2;  // nothing visible yet: p = 0, not NaN
                const float old = exp2_approx(max[m][h] * scale_log2 - base);
                float total = 0.f;
                max[m][h] = top;
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    const float x = exp2_approx(fmaf(s[m][n][2 * h], scale_log2, -base));
                    const float y = exp2_approx(fmaf(s[m][n][2 * h + 1], scale_log2, -base));
                    total += x + y;
                    p[n / 2][m][n % 2 * 2 + h] = pack<real16>(x * v_scale(n, 0), y * v_scale(n, 1));
                }
                sum[m][h] = sum[m][h] * old + total;
#pragma unroll
                for (int c = 0; c < CHUNKS; ++c) {
                    o[m][c][2 * h] *= old;
                    o[m][c][2 * h + 1] *= old;
                }
            }
    }

    // And their values, a tile.
    template <int STEPS>
    __device__ __forceinline__ void accumulate(const unsigned (&p)[STEPS][M][4], real16* v) {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
#pragma unroll
            for (int c = 0; c < CHUNKS; c += 2) {
                unsigned b[4];
                ldmatrix_x4_trans(b, chunk_at(v, step * 16 + (lane >> 3 & 1) * 8 + (lane & 7), c, lane >> 4));
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    mma_16816<real16>(o[m][c], p[step][m], b);
                    mma_16816<real16>(o[m][c + 1], p[step][m], b + 2);
                }
            }
    }

    // The sum over all columns, and from it the factor of o and the log of the softmax's denominator.
    __device__ __forceinline__ void finish(int m, int h, float scale, float& factor, float& lse) {
        float total = sum[m][h];
        total += __shfl_xor_sync(FULL_MASK, total, 1);
        total += __shfl_xor_sync(FULL_MASK, total, 2);
        factor = total > 0.f ? 1.f / total : 0.f;
        lse = total > 0.f ? max[m][h] * scale + logf(total) : NEG_INF;
    }
};
