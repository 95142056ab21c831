/* Rows of 4 and of 5 bits (Levels of minillm/ops/pages.py): which of 16 or 32 levels each element of the row's Hadamard transform is
 * at. Of each 32 elements the low 4 bits of element i and of i + 16 are byte i; of 5 bits, the fifth ones of all elements follow. */
#ifndef MINILLM_LEVELS_H
#define MINILLM_LEVELS_H

#include "minillm_cpu.h"
#include "simd.h"

/* The best levels of a Gaussian (Lloyd 1982, Max 1960) in whole numbers: of 4 bits, of 5 bits. */
static const int8_t LEVELS_4[16] __attribute__((unused)) = {-127, -96, -75, -58, -44, -31, -18, -6, 6, 18, 31, 44, 58, 75, 96, 127};
static const int8_t LEVELS_5[32] __attribute__((unused)) = {-127, -105, -90, -79, -70, -61, -54, -47, -41, -35, -29, -24, -18, -13, -8, -3,
                                                            3,    8,    13,  18,  24,  29,  35,  41,  47,  54,  61,  70,  79,  90,  105, 127};

INLINE const int8_t *levels_of(const int bits) { return bits == 4 ? LEVELS_4 : LEVELS_5; }

INLINE int64_t level_bytes(const int bits, int64_t d) { return (d + 31) / 32 * 4 * bits; }

#if defined(__AVX2__)
/* The levels of 16 elements whose 4 low bits are bytes, and of 5 bits whose fifth ones are the bits of `high`. */
INLINE __m128i levels_at(const int bits, __m128i low, uint32_t high)
{
    const __m128i level = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)levels_of(bits)), low);
    if (bits == 4)
        return level;
    const __m128i bytes = _mm_shuffle_epi8(_mm_cvtsi32_si128((int)high), _mm_set_epi64x(0x0101010101010101, 0));
    const __m128i bit = _mm_set1_epi64x((int64_t)0x8040201008040201);
    const __m128i upper = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(LEVELS_5 + 16)), low);
    return _mm_blendv_epi8(level, upper, _mm_cmpeq_epi8(_mm_and_si128(bytes, bit), bit));
}
#endif

/* The levels of a row of d; what is written is a multiple of 32. */
INLINE void from_levels(const int bits, const uint8_t *row, int64_t d, int8_t *out)
{
    for (int64_t i = 0; i < d; i += 32) {
        const uint8_t *pairs = row + i / 2;
        uint32_t high = 0;
        for (int j = 0; bits == 5 && j < 4; j++)
            high |= (uint32_t)row[level_bytes(4, d) + i / 8 + j] << 8 * j;
#if defined(__AVX2__)
        const __m128i both = _mm_loadu_si128((const __m128i *)pairs), four = _mm_set1_epi8(15);
        _mm_storeu_si128((__m128i *)(out + i), levels_at(bits, _mm_and_si128(both, four), high));
        _mm_storeu_si128((__m128i *)(out + i + 16), levels_at(bits, _mm_and_si128(_mm_srli_epi16(both, 4), four), high >> 16));
#else
        for (int j = 0; j < 32; j++)
            out[i + j] = levels_of(bits)[(pairs[j % 16] >> j / 16 * 4 & 15) | (high >> j & 1) << 4];
#endif
    }
}

INLINE void hadamard_step(float *x, int64_t d, const int64_t step)
{
    for (int64_t i = 0; i < d; i += 2 * step)
        for (int64_t j = i; j < i + step; j++) {
            const float a = x[j], b = x[j + step];
            x[j] = a + b;
            x[j + step] = a - b;
        }
}

/* x (d,) times the normalised Hadamard matrix, which is its own inverse, of each block of the largest power of two that divides d. */
static inline void hadamard(float *x, int64_t d)
{
    const int64_t block = d & -d;
    if (block > 1)
        hadamard_step(x, d, 1);
    if (block > 2)
        hadamard_step(x, d, 2);
    if (block > 4)
        hadamard_step(x, d, 4);
    for (int64_t step = 8; step < block; step *= 2)
        hadamard_step(x, d, step);
    const float norm = (float)(1 / sqrt((double)block));
    for (int64_t i = 0; i < d; i++)
        x[i] *= norm;
}

/* x (d,), transformed already, to a row; its scale, a bf16 word. Each element over the largest times 127 is at the level nearest
 * to it, of two as near the lower; the scale is that of the least square error. */
static inline uint16_t to_levels(const int bits, const float *x, int64_t d, uint8_t *row)
{
    const int8_t *levels = levels_of(bits);
    const int64_t room = round_up(d, 32);
    float units[room], at[room];
    uint8_t codes[room];
    float top = 0, product = 0, square = 0;
    for (int64_t i = 0; i < d; i++)
        top = fmaxf(top, fabsf(x[i]));
    const float unit = top / 127;
    for (int64_t i = 0; i < room; i++)
        units[i] = i < d && unit > 0 ? x[i] / unit : 0;
    for (int64_t i = 0; i < room; i += VW) {
        const vf u = load(units + i);
        vf level = splat(levels[0]);
        vi code = (vi)splat_u(0);
        for (int j = 1; j < 1 << bits; j++) {
            const vi above = u > splat((levels[j - 1] + levels[j]) * 0.5f);
            code -= above;
            level += choose(above, splat(levels[j] - levels[j - 1]), splat(0));
        }
        store(at + i, level);
        const vb narrow = __builtin_convertvector(code, vb);
        memcpy(codes + i, &narrow, sizeof narrow);
    }
    for (int64_t i = d; i < room; i++)
        codes[i] = 0;
    for (int64_t i = 0; i < d; i++) {
        product += units[i] * at[i];
        square += at[i] * at[i];
    }
    for (int64_t i = 0; i < room / 2; i++)
        row[i] = (uint8_t)((codes[i / 16 * 32 + i % 16] & 15) | codes[i / 16 * 32 + i % 16 + 16] << 4);
    for (int64_t i = 0; bits == 5 && i < room / 8; i++) {
        uint8_t high = 0;
        for (int j = 0; j < 8; j++)
            high |= (uint8_t)(codes[i * 8 + j] >> 4 << j);
        row[room / 2 + i] = high;
    }
    return bf16_of(product / square * unit);
}

#endif
