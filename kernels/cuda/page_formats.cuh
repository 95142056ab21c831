// The formats of rows in pages, a struct each, and of pages, which FORMAT names: what CUDA knows of one stands here and in
// levels.cuh and nowhere else.
//
// A row is ROW words of type Word, and if it is SCALED, a scale in bf16; where it is TURNED, of its Hadamard transform.
// `store` and `load`: a thread's share of a row, 8 of its elements x, in real16; all threads of the row's Team do theirs at
// once, and those beyond the row have zeros, which go nowhere. The share is PARTS runs of elements, HEAD_DIM / PARTS apart,
// the first at `i`. `fetch`: a warp begins to copy the rows of a page into a tile of shared memory. `Numbers`: the format
// whose tile it meets queries and weights in; `spread` makes such a tile of one fetched, in `room`, where it is another.
// `dot_products` and `accumulate`: rows in tiles of shared
// memory meet queries and weights without their scales and over UNITS; column c of the sums over V is of `feature(c)`.
#pragma once
#include "attention.cuh"
#include "pages.cuh"

template <int PARTS, class T, int N>
__device__ __forceinline__ void store_parts(T* row, int i, const T (&x)[N]) {
    if (i >= HEAD_DIM / PARTS) return;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        Pack<T, N / PARTS> pack;
#pragma unroll
        for (int j = 0; j < N / PARTS; ++j) pack.v[j] = x[part * (N / PARTS) + j];
        *reinterpret_cast<Pack<T, N / PARTS>*>(row + part * (HEAD_DIM / PARTS) + i) = pack;
    }
}

struct WordRows {  // real16
    typedef real16 Word;
    static const int ROW = HEAD_DIM;
    static const bool SCALED = false, TURNED = false;
    typedef WordRows Numbers;
    static constexpr float UNITS = 1.f;

    static __device__ __forceinline__ void fetch(Word* tile, const Word* rows, int n_there, int lane) {
        copy_rows<PAGE_SIZE, 32, ROW>(tile, rows, n_there, lane);
    }
    static __device__ __forceinline__ Word* spread(Word* tile, int8*) { return tile; }
    template <int PARTS, int N>
    static __device__ __forceinline__ void store(Word* row, bf16*, int i, const real16 (&x)[N]) {
        store_parts<PARTS>(row, i, x);
    }
    template <int N>
    static __device__ __forceinline__ void load(real16 (&x)[N], const Word* row, const bf16*, int i) {
        Pack<real16, N> pack = {};
        if (i < HEAD_DIM) pack = *reinterpret_cast<const Pack<real16, N>*>(row + i);
#pragma unroll
        for (int j = 0; j < N; ++j) x[j] = pack.v[j];
    }
    template <int M, int N>
    static __device__ __forceinline__ void dot_products(float (&s)[M][N][4], real16* q, Word* k) {
        ::dot_products(s, q, k);
    }
    template <int M, int STEPS>
    static __device__ __forceinline__ void accumulate(Rows<M>& rows, const unsigned (&p)[STEPS][M][4], Word* v) {
        rows.accumulate(p, v);
    }
    static __device__ __forceinline__ int feature(int column) { return column; }
};

// Bytes 0 and 2 of a word, int8, as two 16-bit floats in one word: exact, over Int8Rows::UNITS, so that a weight times UNITS
// times a row's scale, which is about half the row's largest element, neither overflows half nor vanishes.
// The lowest 7 bits and 128 times the sign stand in the mantissas of two numbers; the difference is left. ONE: of half
// 16, of bf16 2, where the lowest bit of the mantissa is 1 / UNITS.
template <class T>
__device__ __forceinline__ unsigned widened(unsigned word);

#define DEFINE_WIDENED(T, T2, ONE)                                                                     \
    template <>                                                                                        \
    __device__ __forceinline__ unsigned widened<T>(unsigned word) {                                    \
        const unsigned low = and_or<0x007f007f, ONE>(word), sign = and_or<0x00800080, ONE>(word);      \
        const T2 x = __hsub2(*reinterpret_cast<const T2*>(&low), *reinterpret_cast<const T2*>(&sign)); \
        return *reinterpret_cast<const unsigned*>(&x);                                                 \
    }
DEFINE_WIDENED(half, __half2, 0x4c004c00)
DEFINE_WIDENED(bf16, __nv_bfloat162, 0x40004000)
#undef DEFINE_WIDENED

struct Int8Rows {  // whole numbers; the scale is max|x| / 127
    typedef int8 Word;
    static const int ROW = HEAD_DIM;
    static const bool SCALED = true, TURNED = false;
    typedef Int8Rows Numbers;
    static constexpr float UNITS = 64.f;

    static __device__ __forceinline__ void fetch(Word* tile, const Word* rows, int n_there, int lane) {
        copy_rows<PAGE_SIZE, 32, ROW>(tile, rows, n_there, lane);
    }
    static __device__ __forceinline__ Word* spread(Word* tile, int8*) { return tile; }
    template <int PARTS, int N>
    static __device__ __forceinline__ void store(Word* row, bf16* scale, int i, const real16 (&x)[N]) {
        float top = 0.f;
#pragma unroll
        for (int j = 0; j < N; ++j) top = fmaxf(top, fabsf(to_float(x[j])));
        const bf16 word = from_float<bf16>(Team::max(top) / 127.f);
        const float unit = to_float(word);
        Word numbers[N];
#pragma unroll
        for (int j = 0; j < N; ++j)
            numbers[j] = unit > 0.f ? (Word)fminf(fmaxf(rintf(to_float(x[j]) / unit), -127.f), 127.f) : 0;
        store_parts<PARTS>(row, i, numbers);
        if (i == 0) *scale = word;
    }

    template <int N>
    static __device__ __forceinline__ void load(real16 (&x)[N], const Word* row, const bf16* scale, int i) {
        Pack<Word, N> numbers = {};
        if (i < HEAD_DIM) numbers = *reinterpret_cast<const Pack<Word, N>*>(row + i);
#pragma unroll
        for (int j = 0; j < N; ++j) x[j] = from_float<real16>((float)numbers.v[j] * to_float(*scale));
    }

    // In a word of K lie four features of a row, of which `widened` takes the even and the odd together: those of Q are put
    // in the same order.
    template <int M, int N>
    static __device__ __forceinline__ void dot_products(float (&s)[M][N][4], real16* q, Word* k) {
        const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
        clear(s);
#pragma unroll(2 - HEAD_DIM / 16 % 2)  // a step that is left over takes registers
        for (int step = 0; step < HEAD_DIM / 16; ++step) {
            unsigned a[M][4];
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const real16* row = chunk_at(q, m * 16 + h * 8 + g, step * 2, t >> 1);
                    const uint2 four = *reinterpret_cast<const uint2*>(row + t % 2 * 4);
                    a[m][h] = __byte_perm(four.x, four.y, 0x5410);
                    a[m][2 + h] = __byte_perm(four.x, four.y, 0x7632);
                }
#pragma unroll
            for (int n = 0; n < N; n += 4) {
                unsigned words[4];
                ldmatrix_x4(words, chunk_at(k, n * 8 + lane, step));
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const unsigned b[2] = {widened<real16>(words[i]), widened<real16>(words[i] >> 8)};
#pragma unroll
                    for (int m = 0; m < M; ++m) mma_16816<real16>(s[m][n + i], a[m], b);
                }
            }
        }
    }

    // In 16 bits of a row of V lie features 2i and 2i + 1 of a chunk of 16, which become column i of two tiles that follow one
    // another.
    template <int M, int STEPS>
    static __device__ __forceinline__ void accumulate(Rows<M>& rows, const unsigned (&p)[STEPS][M][4], Word* v) {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
#pragma unroll
            for (int c = 0; c < CHUNKS; c += 4) {
                unsigned words[4];  // of entries 0 .. 7 and 8 .. 15 of a chunk; of the next, if there is one
                const int odd = c + 2 < CHUNKS ? lane >> 4 : 0;
                ldmatrix_x4_trans(words, chunk_at(v, step * 16 + (lane >> 3 & 1) * 8 + (lane & 7), c / 2, odd));
#pragma unroll
                for (int i = 0; i < 4 && c + i < CHUNKS; ++i) {
                    const unsigned *pair = words + i / 2 * 2, shift = i % 2 * 8;
                    const unsigned b[2] = {widened<real16>(pair[0] >> shift), widened<real16>(pair[1] >> shift)};
#pragma unroll
                    for (int m = 0; m < M; ++m) mma_16816<real16>(rows.o[m][c + i], p[step][m], b);
                }
            }
    }
    static __device__ __forceinline__ int feature(int column) {
        return column / 16 * 16 + column % 8 * 2 + column / 8 % 2;
    }
};

#include "levels.cuh"

struct Words { typedef WordRows K, V; };
struct Int8 { typedef Int8Rows K, V; };
struct K5V4 { typedef LevelRows<5> K; typedef LevelRows<4> V; };
struct Q4 { typedef LevelRows<4> K, V; };
