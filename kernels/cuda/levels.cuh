// Rows of 4 and of 5 bits (Levels of minillm/ops/pages.py): which of 16 or 32 levels each element of the row's Hadamard
// transform is at. Of each 32 elements the low 4 bits of element i and of i + 16 are byte i; of 5 bits, the fifth ones of
// all elements follow.
#pragma once

// Over lanes that follow one another, each with PARTS runs of N / PARTS elements of a row: the row's normalised Hadamard
// transform, which is its own inverse.
template <int PARTS, int N>
__device__ __forceinline__ void hadamard(float (&x)[N], unsigned mask) {
    constexpr int RUN = N / PARTS, LANES = HEAD_DIM / N;
#pragma unroll
    for (int step = 1; step < RUN; step *= 2)
#pragma unroll
        for (int j = 0; j < N; ++j)
            if (!(j & step)) {
                const float a = x[j], b = x[j + step];
                x[j] = a + b;
                x[j + step] = a - b;
            }
#pragma unroll
    for (int offset = 1; offset < LANES; offset *= 2)
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float other = __shfl_xor_sync(mask, x[j], offset);
            x[j] = threadIdx.x & offset ? other - x[j] : x[j] + other;
        }
#pragma unroll
    for (int step = RUN; step < N; step *= 2)
#pragma unroll
        for (int j = 0; j < N; ++j)
            if (!(j & step)) {
                const float a = x[j], b = x[j + step];
                x[j] = a + b;
                x[j + step] = a - b;
            }
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] *= HEAD_DIM == 64 ? 0.125f : 0.08838834764831845f;
}

// The lanes of a thread's row, which follow one another.
template <int LANES>
__device__ __forceinline__ unsigned lanes_of_row() {
    return FULL_MASK >> (32 - LANES) << (threadIdx.x & 31 & -LANES);
}

// The same of 16 rows of queries in a tile, by a warp.
__device__ __forceinline__ void hadamard_tile(real16* tile) {
    constexpr int N = HEAD_DIM / 32;
    const int lane = threadIdx.x & 31;
    for (int row = 0; row < 16; ++row) {
        float x[N];
#pragma unroll
        for (int j = 0; j < N; ++j) x[j] = to_float(chunk_at(tile, row, j * 4 + lane / 8)[lane % 8]);
        hadamard<N>(x, FULL_MASK);
#pragma unroll
        for (int j = 0; j < N; ++j) chunk_at(tile, row, j * 4 + lane / 8)[lane % 8] = from_float<real16>(x[j]);
    }
}

// The best levels of a Gaussian (Lloyd 1982, Max 1960) in whole numbers, four a word, ascending: no array in memory.
template <int BITS>
__device__ __forceinline__ constexpr unsigned levels(int word) {
    return BITS == 4   ? (word < 2 ? (word ? 0xfaeee1d4 : 0xc6b5a081) : word == 2 ? 0x2c1f1206 : 0x7f604b3a)
           : word < 4 ? (word < 2 ? (word ? 0xd1cac3ba : 0xb1a69781) : word == 2 ? 0xe8e3ddd7 : 0xfdf8f3ee)
                      : (word < 6 ? (word == 4 ? 0x120d0803 : 0x29231d18) : word == 6 ? 0x463d362f : 0x7f695a4f);
}
template <int BITS>
__device__ __forceinline__ constexpr float level(int code) {
    return (float)(int8)(levels<BITS>(code / 4) >> code % 4 * 8 & 255);
}

template <int BITS>
struct LevelRows {
    typedef unsigned char Word;
    static const int ROW = HEAD_DIM / 8 * BITS;
    static const bool SCALED = true, TURNED = true;
    typedef Int8Rows Numbers;

    // Each element over the largest times 127 is at the level nearest to it, of two as near the lower; the scale is that of
    // the least square error.
    template <int PARTS, int N>
    static __device__ __forceinline__ void store(Word* row, bf16* scale, int i, const real16 (&x)[N]) {
        constexpr int LANES = HEAD_DIM / N, RUN = N / PARTS;
        const unsigned mask = lanes_of_row<LANES>();
        float y[N], top = 0.f, product = 0.f, square = 0.f;
#pragma unroll
        for (int j = 0; j < N; ++j) y[j] = to_float(x[j]);
        hadamard<PARTS>(y, mask);
#pragma unroll
        for (int j = 0; j < N; ++j) top = fmaxf(top, fabsf(y[j]));
#pragma unroll
        for (int offset = LANES / 2; offset; offset >>= 1) top = fmaxf(top, __shfl_xor_sync(mask, top, offset));
        const float unit = top / 127.f;
        unsigned codes[N] = {};
        float at[N], last = level<BITS>(0);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            y[j] = unit > 0.f ? y[j] / unit : 0.f;
            at[j] = last;
        }
#pragma unroll 1
        for (int code = 1; code < 1 << BITS; ++code) {
            const float next = level<BITS>(code), middle = (last + next) * 0.5f;
#pragma unroll
            for (int j = 0; j < N; ++j) {
                codes[j] += y[j] > middle;
                at[j] = y[j] > middle ? next : at[j];
            }
            last = next;
        }
#pragma unroll
        for (int j = 0; j < N; ++j) {
            product += y[j] * at[j];
            square += at[j] * at[j];
        }
#pragma unroll
        for (int offset = LANES / 2; offset; offset >>= 1) {
            product += __shfl_xor_sync(mask, product, offset);
            square += __shfl_xor_sync(mask, square, offset);
        }
        if (threadIdx.x % LANES == 0) *scale = from_float<bf16>(product / square * unit);
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
            put<RUN>(row, part * (HEAD_DIM / PARTS) + i, codes + part * RUN, mask);
    }

    // Elements i .. i + RUN - 1 of a row; other lanes bring those 16 further, which are in the same bytes.
    template <int RUN>
    static __device__ __forceinline__ void put(Word* row, int i, const unsigned* codes, unsigned mask) {
        constexpr int WORDS = (RUN + 3) / 4;
        unsigned low[WORDS] = {}, high = 0;
#pragma unroll
        for (int j = 0; j < RUN; ++j) {
            low[j / 4] |= (codes[j] & 15) << j % 4 * 8;
            high |= (codes[j] >> 4) << (i + j) % 8;
        }
#pragma unroll
        for (int w = 0; w < WORDS; ++w) low[w] |= __shfl_xor_sync(mask, low[w], 16 / RUN) << 4;
        if (i % 32 < 16)
#pragma unroll
            for (int j = 0; j < RUN; ++j) row[i / 32 * 16 + i % 16 + j] = low[j / 4] >> j % 4 * 8 & 255;
        if (BITS == 4) return;
#pragma unroll
        for (int offset = 1; offset < 8 / RUN; offset *= 2) high |= __shfl_xor_sync(mask, high, offset);
        if (i % 8 == 0) row[HEAD_DIM / 2 + i / 8] = high;
    }

    template <int N>
    static __device__ __forceinline__ void load(real16 (&x)[N], const Word* row, const bf16* scale, int i) {
        static_assert(N == 8, "a byte of fifth bits");
        const unsigned* low = reinterpret_cast<const unsigned*>(row + i / 32 * 16 + i % 16);
        const unsigned high = BITS == 5 ? row[HEAD_DIM / 2 + i / 8] : 0;
        float y[N];
#pragma unroll
        for (int w = 0; w < 2; ++w) {
            const unsigned four = four_levels(low[w] >> i % 32 / 16 * 4 & 0x0f0f0f0f, high >> w * 4);
#pragma unroll
            for (int j = 0; j < 4; ++j) y[w * 4 + j] = (float)(int8)(four >> j * 8 & 255) * to_float(*scale);
        }
        hadamard<1>(y, lanes_of_row<HEAD_DIM / N>());
#pragma unroll
        for (int j = 0; j < N; ++j) x[j] = from_float<real16>(y[j]);
    }

    // All bytes up to the last row that is there, whole chunks: what lies beyond it is numbers, whatever it is.
    static __device__ __forceinline__ void fetch(Word* tile, const Word* rows, int n_there, int lane) {
#pragma unroll 2
        for (int chunk = lane; chunk < PAGE_SIZE * ROW / 16; chunk += 32)
            cp_async<16>(tile + chunk * 16, rows + chunk * 16, chunk * 16 < n_there * ROW);
    }

    // Four elements a word: of the codes in its bytes, whose fifth bits are those of `high`, the levels.
    static __device__ __forceinline__ unsigned four_levels(unsigned codes, unsigned high) {
        unsigned index = codes & 0x07070707, upper = (codes >> 3 & 0x01010101) * 255;
        index = (index | index >> 4) & 0x00ff00ff;
        index = (index | index >> 8) & 0xffff;
        auto eight = [&](int word) { return __byte_perm(levels<BITS>(word), levels<BITS>(word + 1), index); };
        const unsigned low = (eight(0) & ~upper) | (eight(2) & upper);
        if (BITS == 4) return low;
        const unsigned top = ((high & 1) | (high & 2) << 7 | (high & 4) << 14 | (high & 8) << 21) * 255;
        return (low & ~top) | (((eight(4) & ~upper) | (eight(6) & upper)) & top);
    }

    static __device__ __forceinline__ int8* spread(const Word* tile, int8* room) {
        constexpr int BLOCKS = HEAD_DIM / 32;
        for (int i = threadIdx.x & 31; i < PAGE_SIZE * BLOCKS; i += 32) {
            const int row = i / BLOCKS, block = i % BLOCKS;
            const unsigned* words = reinterpret_cast<const unsigned*>(tile + row * ROW);
            const unsigned high = BITS == 5 ? words[HEAD_DIM / 8 + block] : 0;
            unsigned numbers[2][4];
#pragma unroll
            for (int w = 0; w < 4; ++w)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    numbers[half][w] = four_levels(words[block * 4 + w] >> half * 4 & 0x0f0f0f0f, high >> (half * 16 + w * 4));
#pragma unroll
            for (int half = 0; half < 2; ++half)
                *reinterpret_cast<uint4*>(chunk_at(room, row, block * 2 + half)) =
                    make_uint4(numbers[half][0], numbers[half][1], numbers[half][2], numbers[half][3]);
        }
        __syncwarp();
        return room;
    }
};
