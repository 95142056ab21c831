/* The blocks of a GGUF file, whatever their kind, as the quants and scales that panels.h holds. Their layouts, as ggml has them, are
 * also in minillm/files/formats.py. */
#ifndef MINILLM_FILE_BLOCKS_H
#define MINILLM_FILE_BLOCKS_H

#include "panels.h"

/* X(kind in the file, columns of a block, bytes of a block, kind in memory): the smallest that holds them without loss, or Q8_0. Q2_K,
 * which has an offset for every 16 columns, is rounded a second time. */
#define FOR_FILE_KINDS(X)                                                                                                    \
    X(Q8_0, 32, 34, Q8_0) X(Q4_0, 32, 18, Q4_0) X(Q4_1, 32, 20, Q4_1) X(Q4_K, 256, 144, Q4_K) X(Q5_K, 256, 176, Q5_K)           \
    X(Q6_K, 256, 210, Q6_K) X(Q5_0, 32, 22, Q5_0) X(Q5_1, 32, 24, Q5_1) X(Q2_K, 256, 84, Q8_0) X(Q3_K, 256, 110, Q6_K)         \
    X(IQ4_NL, 32, 18, Q8_0) X(IQ4_XS, 256, 136, Q8_0) X(MXFP4, 32, 17, Q8_0)

typedef struct {
    uint32_t quants[64];          /* unsigned, 4 columns to a word */
    int8_t scales[16], mins[8];   /* of K-quants */
    uint16_t d[8], m[8];          /* float16, for every span of the kind in memory; m: or dmin */
} FileBlock;

INLINE uint32_t word_at(const uint8_t *p) { uint32_t word; memcpy(&word, p, 4); return word; }
INLINE uint16_t half_at(const uint8_t *p) { uint16_t half; memcpy(&half, p, 2); return half; }

/* To nearest, ties to even. */
INLINE uint16_t half_of(float x)
{
    uint32_t bits, rest;
    memcpy(&bits, &x, 4);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    rest = bits & 0x7fffffff;
    if (rest >= 0x47800000) /* 65536 and more, infinity, NaN */
        return sign | (rest > 0x7f800000 ? 0x7e00 : 0x7c00);
    if (rest >= 0x38800000)
        return (uint16_t)(sign + ((rest + 0xfff + (rest >> 13 & 1)) >> 13) - (112 << 10));
    float small; /* a subnormal: 0.5 added, its last bit is worth 2^-24 */
    memcpy(&small, &rest, 4);
    small += 0.5f;
    memcpy(&bits, &small, 4);
    return (uint16_t)(sign + bits - 0x3f000000);
}

/* Words of two quants of 4 bits a byte: the low halves, then the high ones. */
INLINE void nibbles(const uint8_t *bytes, const int words, uint32_t *to)
{
    for (int j = 0; j < words; j++) {
        to[j] = word_at(bytes + 4 * j) & 0x0f0f0f0f;
        to[words + j] = word_at(bytes + 4 * j) >> 4 & 0x0f0f0f0f;
    }
}

/* 32 quants of 5 bits: the fifth of column i is bit i of a word. */
INLINE void five_bits(const uint8_t *fifth, const uint8_t *bytes, uint32_t *to)
{
    nibbles(bytes, 4, to);
    for (int g = 0; g < 8; g++)
        to[g] |= ((word_at(fifth) >> 4 * g & 15) * 0x00204081 & 0x01010101) << 4;
}

/* 12 bytes of 8 scales and 8 mins, 6 bits each. */
INLINE void six_bits(const uint8_t *packed, FileBlock *to)
{
    for (int j = 0; j < 4; j++) {
        to->scales[j] = packed[j] & 63;
        to->mins[j] = packed[4 + j] & 63;
        to->scales[4 + j] = (int8_t)((packed[8 + j] & 15) | packed[j] >> 6 << 4);
        to->mins[4 + j] = (int8_t)(packed[8 + j] >> 4 | packed[4 + j] >> 6 << 4);
    }
}

/* Block b of 8, of 2 bits a quant. */
INLINE void two_bits(const uint8_t *bytes, const int b, uint32_t *to)
{
    for (int j = 0; j < 8; j++)
        to[j] = word_at(bytes + 32 * (b / 4) + 4 * j) >> 2 * (b % 4) & 0x03030303;
}

/* Quants of 4 bits become the whole numbers of a table. */
INLINE void look_up(const int8_t table[16], int n, uint32_t *words)
{
    for (int j = 0; j < n; j++) {
        uint32_t found = 0;
        for (int i = 0; i < 4; i++)
            found |= (uint32_t)(uint8_t)(table[words[j] >> 8 * i & 15] + 128) << 8 * i;
        words[j] = found;
    }
}
static const int8_t IQ4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const int8_t E2M1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12}; /* doubled */

/* 32 weights scale[i / 16] * quant + offset[i / 16] as Q8_0, in place of their quants. -> d, NaN where a weight is not finite. */
INLINE uint16_t round_again(const float scale[2], const float offset[2], uint32_t *quants)
{
    float weights[BLOCK], largest_ = 0, bad = 0;
    for (int i = 0; i < BLOCK; i++) {
        weights[i] = scale[i / 16] * (float)(quants[i / 4] >> 8 * (i % 4) & 255) + offset[i / 16];
        largest_ = fmaxf(largest_, fabsf(weights[i]));
        bad += weights[i] * 0;
    }
    if (bad != bad)
        return half_of(bad);
    const float d = largest_ / 127, inverse = d > 0 ? 1 / d : 0;
    for (int g = 0; g < 8; g++) {
        quants[g] = 0;
        for (int i = 0; i < 4; i++)
            quants[g] |= (uint32_t)(weights[4 * g + i] * inverse + 128.5f) << 8 * i;
    }
    return half_of(d);
}

INLINE void read_k(const int kind, const uint8_t *stored, FileBlock *to)
{
    switch (kind) {
    case Q4_K: /* d, dmin, scales and mins [12], quants [128] */
    case Q5_K: /* d, dmin, scales and mins [12], fifth bits [32], quants [128] */
        to->d[0] = half_at(stored), to->m[0] = half_at(stored + 2);
        six_bits(stored + 4, to);
        for (int pair = 0; pair < 4; pair++)
            nibbles(stored + (kind == Q4_K ? 16 : 48) + 32 * pair, 8, to->quants + 16 * pair);
        for (int j = 0; kind == Q5_K && j < 64; j++)
            to->quants[j] |= (word_at(stored + 16 + 4 * (j % 8)) >> j / 8 & 0x01010101) << 4;
        return;
    case Q6_K: /* low bits [128], high bits [64], scales [16], d */
        to->d[0] = half_at(stored + 208);
        memcpy(to->scales, stored + 192, 16);
        for (int half = 0; half < 2; half++)
            nibbles(stored + 64 * half, 16, to->quants + 32 * half);
        for (int b = 0; b < 8; b++) {
            uint32_t high[8];
            two_bits(stored + 128, b, high);
            for (int j = 0; j < 8; j++)
                to->quants[8 * b + j] |= high[j] << 4;
        }
        return;
    case Q3_K: /* high bits [32], low bits [64], scales [12], d: quants are 4, in memory 32, larger than what they stand for */
        to->d[0] = half_at(stored + 108);
        for (int i = 0; i < 16; i++)
            to->scales[i] = (int8_t)((stored[96 + i % 8] >> 4 * (i / 8) & 15) + (stored[104 + i % 4] >> 2 * (i / 4) & 3) * 16 - 32);
        for (int b = 0; b < 8; b++) {
            two_bits(stored + 32, b, to->quants + 8 * b);
            for (int j = 0; j < 8; j++)
                to->quants[8 * b + j] += 0x1c1c1c1c + ((word_at(stored + 4 * j) >> b & 0x01010101) << 2);
        }
        return;
    case Q2_K: /* scale and min of 4 bits each [16], quants [64], d, dmin */
        for (int b = 0; b < 8; b++) {
            float scale[2], offset[2];
            for (int i = 0; i < 2; i++) {
                scale[i] = f16_to_float(half_at(stored + 80)) * (float)(stored[2 * b + i] & 15);
                offset[i] = -f16_to_float(half_at(stored + 82)) * (float)(stored[2 * b + i] >> 4);
            }
            two_bits(stored + 16, b, to->quants + 8 * b);
            to->d[b] = round_again(scale, offset, to->quants + 8 * b);
        }
        return;
    case IQ4_XS: /* d, high bits of scales (2 bytes), low ones [4], quants [128] */
        for (int b = 0; b < 8; b++) {
            const int scale = (stored[4 + b / 2] >> 4 * (b % 2) & 15) | (half_at(stored + 2) >> 2 * b & 3) << 4;
            to->d[b] = half_of(f16_to_float(half_at(stored)) * (float)(scale - 32));
            nibbles(stored + 8 + 16 * b, 4, to->quants + 8 * b);
        }
        look_up(IQ4, 64, to->quants);
    }
}

INLINE void read_block(const int kind, const uint8_t *stored, FileBlock *to)
{
    switch (kind) {
    case Q8_0: /* d, quants [32] */
        to->d[0] = half_at(stored);
        for (int j = 0; j < 8; j++)
            to->quants[j] = word_at(stored + 2 + 4 * j) ^ 0x80808080u;
        return;
    case Q4_0: /* d, quants [16] */
        to->d[0] = half_at(stored);
        nibbles(stored + 2, 4, to->quants);
        return;
    case Q4_1: /* d, m, quants [16] */
        to->d[0] = half_at(stored), to->m[0] = half_at(stored + 2);
        nibbles(stored + 4, 4, to->quants);
        return;
    case Q5_0: /* d, fifth bits [4], quants [16] */
        to->d[0] = half_at(stored);
        five_bits(stored + 2, stored + 6, to->quants);
        return;
    case Q5_1: /* d, m, fifth bits [4], quants [16] */
        to->d[0] = half_at(stored), to->m[0] = half_at(stored + 2);
        five_bits(stored + 4, stored + 8, to->quants);
        return;
    case IQ4_NL: /* d, quants [16] */
        to->d[0] = half_at(stored);
        nibbles(stored + 2, 4, to->quants);
        look_up(IQ4, 8, to->quants);
        return;
    case MXFP4: /* exponent, quants [16] */
        to->d[0] = half_of(ldexpf(1, stored[0] - 128));
        nibbles(stored + 1, 4, to->quants);
        look_up(E2M1, 8, to->quants);
        return;
    default:
        read_k(kind, stored, to);
    }
}

#endif
