// Rows of 4 and of 5 bits (Levels of minillm/ops/pages.py): which of 16 or 32 levels each element of the row's Hadamard
// transform is at. Of each 32 elements the low 4 bits of element i and of i + 16 are byte i; of 5 bits, the fifth ones of
// all elements follow. What lies beyond the row is 0.
#pragma once

// A block of the Hadamard transform is the largest power of two that divides a row, and what it is normalised by.
static const int BLOCK = D & -D;
static constexpr float NORM = BLOCK == 16 ? 0.25f : BLOCK == 32 ? 0.17677669529663687f : BLOCK == 64 ? 0.125f
                            : BLOCK == 128 ? 0.08838834764831845f : 0.0625f;

// Of rows, a team each: the normalised Hadamard transform of each block, which is its own inverse. x: elements 8 to a thread.
__device__ __forceinline__ void hadamard(float (&x)[8]) {
#pragma unroll
    for (int step = 1; step < 8; step *= 2)
#pragma unroll
        for (int j = 0; j < 8; ++j)
            if (!(j & step)) {
                const float a = x[j], b = x[j + step];
                x[j] = a + b;
                x[j + step] = a - b;
            }
#pragma unroll
    for (int offset = 1; offset < BLOCK / 8; offset *= 2)
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float other = __shfl_xor_sync(Team::mask(), x[j], offset);
            x[j] = threadIdx.x & offset ? other - x[j] : x[j] + other;
        }
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] *= NORM;
}

// The same of 16 rows of queries in a tile, by a warp.
__device__ __forceinline__ void hadamard_tile(real16* tile) {
    const int lane = threadIdx.x & 31, chunk = lane % TEAM;
    for (int row = lane / TEAM; row < 16; row += 32 / TEAM) {
        float x[8] = {};
        if (chunk < CHUNKS) load(x, chunk_at(tile, row, chunk));
        hadamard(x);
        if (chunk < CHUNKS) store(chunk_at(tile, row, chunk), x);
    }
}

// A thread's share of a row in PARTS runs -> 8 elements that follow one another, the first at 8 times its place in the team.
template <int PARTS>
__device__ __forceinline__ void in_order(float (&y)[8], const real16 (&x)[8]) {
    if (PARTS == 1) {
#pragma unroll
        for (int j = 0; j < 8; ++j) y[j] = to_float(x[j]);
        return;
    }
    static_assert(PARTS <= 2, "the halves of a row");
    const int place = threadIdx.x % TEAM, upper = place >= D / 16, first = 2 * (place - upper * (D / 16));
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const float low = __shfl_sync(Team::mask(), to_float(x[j % 4]), first + j / 4, TEAM);
        const float high = __shfl_sync(Team::mask(), to_float(x[4 + j % 4]), first + j / 4, TEAM);
        y[j] = place >= D / 8 ? 0.f : upper ? high : low;
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
    static const int BLOCKS = (D + 31) / 32, ROW = BLOCKS * 4 * BITS;
    static const bool SCALED = true, TURNED = true;
    typedef Int8Rows Numbers;

    // Each element over the largest times 127 is at the level nearest to it, of two as near the lower; the scale is that of
    // the least square error.
    template <int PARTS>
    static __device__ __forceinline__ void store(Word* row, bf16* scale, int, const real16 (&x)[8]) {
        const int i = threadIdx.x % TEAM * 8;
        float y[8], top = 0.f, product = 0.f, square = 0.f;
        in_order<PARTS>(y, x);
        hadamard(y);
#pragma unroll
        for (int j = 0; j < 8; ++j) top = fmaxf(top, fabsf(y[j]));
        const float unit = Team::max(top) / 127.f;
        unsigned codes[8] = {};
        float at[8], last = level<BITS>(0);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            y[j] = unit > 0.f ? y[j] / unit : 0.f;
            at[j] = last;
        }
#pragma unroll 1
        for (int code = 1; code < 1 << BITS; ++code) {
            const float next = level<BITS>(code), middle = (last + next) * 0.5f;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                codes[j] += y[j] > middle;
                at[j] = y[j] > middle ? next : at[j];
            }
            last = next;
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (i >= D) codes[j] = 0, at[j] = 0.f;
            product += y[j] * at[j];
            square += at[j] * at[j];
        }
        product = Team::sum(product), square = Team::sum(square);
        if (i == 0) *scale = from_float<bf16>(product / square * unit);
        put(row, i, codes);
    }

    // Elements i .. i + 7 of a row; another thread brings those 16 further, which are in the same bytes.
    static __device__ __forceinline__ void put(Word* row, int i, const unsigned (&codes)[8]) {
        unsigned low[2] = {}, high = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            low[j / 4] |= (codes[j] & 15) << j % 4 * 8;
            high |= (codes[j] >> 4) << j;
        }
#pragma unroll
        for (int w = 0; w < 2; ++w) low[w] |= __shfl_xor_sync(Team::mask(), low[w], 2) << 4;
        if (i >= BLOCKS * 32) return;
        if (i % 32 < 16)
#pragma unroll
            for (int w = 0; w < 2; ++w) reinterpret_cast<unsigned*>(row + i / 32 * 16 + i % 16)[w] = low[w];
        if (BITS == 5) row[BLOCKS * 16 + i / 8] = high;
    }

    static __device__ __forceinline__ void load(real16 (&x)[8], const Word* row, const bf16* scale, int i) {
        float y[8] = {};
        if (i < D) {
            const unsigned* low = reinterpret_cast<const unsigned*>(row + i / 32 * 16 + i % 16);
            const unsigned high = BITS == 5 ? row[BLOCKS * 16 + i / 8] : 0;
#pragma unroll
            for (int w = 0; w < 2; ++w) {
                const unsigned four = four_levels(low[w] >> i % 32 / 16 * 4 & 0x0f0f0f0f, high >> w * 4);
#pragma unroll
                for (int j = 0; j < 4; ++j) y[w * 4 + j] = (float)(int8)(four >> j * 8 & 255) * to_float(*scale);
            }
        }
        hadamard(y);
#pragma unroll
        for (int j = 0; j < 8; ++j) x[j] = from_float<real16>(y[j]);
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
        for (int i = threadIdx.x & 31; i < PAGE_SIZE * BLOCKS; i += 32) {
            const int row = i / BLOCKS, block = i % BLOCKS;
            const unsigned* words = reinterpret_cast<const unsigned*>(tile + row * ROW);
            const unsigned high = BITS == 5 ? words[BLOCKS * 4 + block] : 0;
            unsigned numbers[2][4];
#pragma unroll
            for (int w = 0; w < 4; ++w)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    numbers[half][w] = four_levels(words[block * 4 + w] >> half * 4 & 0x0f0f0f0f, high >> (half * 16 + w * 4));
#pragma unroll
            for (int half = 0; half < 2; ++half)
                if (block * 2 + half < D / 16)
                    *reinterpret_cast<uint4*>(chunk_at(room, row, block * 2 + half)) =
                        make_uint4(numbers[half][0], numbers[half][1], numbers[half][2], numbers[half][3]);
        }
        __syncwarp();
        return room;
    }
};
