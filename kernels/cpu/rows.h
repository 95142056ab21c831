/* K or V of an entry in pages, in each RowFormat of minillm.ops.pages: what C knows of a format stands here and in levels.h and nowhere
 * else. A row is numbers, which arithmetic takes as they are, and a scale for all of them, 1 where the format has none; where it is
 * `turned`, they are of its Hadamard transform. */
#ifndef MINILLM_ROWS_H
#define MINILLM_ROWS_H

#include "levels.h"
#include "minillm_cpu.h"
#include "simd.h"

enum RowFormat { ROW_F32, ROW_BF16, ROW_I8, ROW_Q4, ROW_Q5 };

/* call(format), where it is a constant, of any: what says `const int format` below is straight code then. */
#define BY_FORMAT(format, call)               \
    switch (format) {                         \
    case ROW_F32: call(ROW_F32); break;     \
    case ROW_BF16: call(ROW_BF16); break;   \
    case ROW_I8: call(ROW_I8); break;         \
    case ROW_Q4: call(ROW_Q4); break;         \
    default: call(ROW_Q5); break;             \
    }

INLINE int turned(const int format) { return format >= ROW_Q4; }

INLINE int scaled(const int format) { return format >= ROW_I8; }

INLINE int bits_of(const int format) { return format == ROW_Q4 ? 4 : 5; }

/* The same of a format whose numbers lie one by one. */
#define BY_NUMBERS(format, call)              \
    switch (format) {                         \
    case ROW_F32: call(ROW_F32); break;       \
    case ROW_BF16: call(ROW_BF16); break;     \
    default: call(ROW_I8); break;             \
    }

INLINE int64_t row_bytes(const int format, int64_t d)
{
    return turned(format) ? level_bytes(bits_of(format), d) : d * (format == ROW_F32 ? 4 : format == ROW_BF16 ? 2 : 1);
}

/* Row `at` of K, or of V. */
INLINE char *row_of(const int format, const Slab *slab, int values, int64_t at, int64_t d) { return slab->rows[values] + at * row_bytes(format, d); }

INLINE float row_scale(const int format, const Slab *slab, int values, int64_t at)
{
    return scaled(format) ? bf16_to_float(slab->scales[values][at]) : 1;
}

/* Numbers i .. i + VW - 1 of a row whose numbers lie one by one. */
INLINE vf load_row(const int format, const void *row, int64_t i)
{
    return format == ROW_F32    ? load((const float *)row + i)
           : format == ROW_BF16 ? load_bf16((const uint16_t *)row + i)
                                 : load_i8((const int8_t *)row + i);
}

/* And one of them. */
INLINE float load_row_one(const int format, const void *row, int64_t i)
{
    return format == ROW_F32    ? ((const float *)row)[i]
           : format == ROW_BF16 ? bf16_to_float(((const uint16_t *)row)[i])
                                 : ((const int8_t *)row)[i];
}

/* The format of numbers_of. */
INLINE int one_by_one(const int format) { return turned(format) ? ROW_I8 : format; }

/* The numbers of n rows that follow one another, each d one by one: where they are, or in `room` (n d, and what makes the last row whole
 * blocks of 32). */
INLINE const char *numbers_of(const int format, const char *rows, int64_t n, int64_t d, int8_t *room)
{
    if (!turned(format))
        return rows;
    for (int64_t e = 0; e < n; e++)
        from_levels(bits_of(format), (const uint8_t *)rows + e * row_bytes(format, d), d, room + e * d);
    return (const char *)room;
}
#define NUMBERS_OF(format) return numbers_of(format, rows, n, d, room)

/* The same of any format. */
INLINE const char *numbers_of_any(int format, const char *rows, int64_t n, int64_t d, int8_t *room) { BY_FORMAT(format, NUMBERS_OF) }

INLINE const float *widen(const int format, const Slab *slab, int values, int64_t at, int64_t d, float *room)
{
    const char *row = row_of(format, slab, values, at, d);
    if (format == ROW_F32)
        return (const float *)row;
    const int stored = one_by_one(format);
    const float scale = row_scale(format, slab, values, at);
    int8_t numbers[round_up(d, 32)];
    row = numbers_of(format, row, 1, d, numbers);
    int64_t i = 0;
    for (; i + VW <= d; i += VW)
        store(room + i, load_row(stored, row, i) * splat(scale));
    for (; i < d; i++)
        room[i] = load_row_one(stored, row, i) * scale;
    if (turned(format))
        hadamard(room, d);
    return room;
}
#define WIDEN(format) return widen(format, slab, values, at, d, room)

/* Row `at` widened (d,) into `room`, unless it is of floats: where it is then. Of any format. */
INLINE const float *widened(int format, const Slab *slab, int values, int64_t at, int64_t d, float *room) { BY_FORMAT(format, WIDEN) }

/* A row as mm.h takes it: of which Kind, and row `at`, where it lies or widened. Of any format. */
INLINE int operand_kind(int format) { return format == ROW_BF16 ? BF16 : F32; }

INLINE const void *operand(int format, const Slab *slab, int values, int64_t at, int64_t d, float *room)
{
    return format == ROW_BF16 ? row_of(format, slab, values, at, d) : (const void *)widened(format, slab, values, at, d, room);
}

/* A row in 8 bits: q (d,) = x / scale to nearest, ties to even; scale is a bf16 word of max|x| / 127. */
static inline uint16_t to_i8(const float *x, int64_t d, int8_t *q)
{
    const float magic = 12582912.0f; /* 1.5 * 2^23: a sum with it has the nearest whole number in its low bits */
    float top = 0;
    int64_t i = 0;
    vf high = splat(0);
    for (; i + VW <= d; i += VW)
        high = vmax(high, (vf)((vu)load(x + i) & splat_u(0x7fffffff)));
    top = largest(high);
    for (; i < d; i++)
        top = fmaxf(top, fabsf(x[i]));
    const uint16_t word = bf16_of(top / 127);
    const float scale = word ? bf16_to_float(word) : 1;
    for (i = 0; i + VW <= d; i += VW) {
        vf units = load(x + i) / splat(scale);
        units = vmax(-vmax(-units, splat(-127)), splat(-127));
        const vb whole = __builtin_convertvector((vi)(units + splat(magic)) - (vi)splat(magic), vb);
        memcpy(q + i, &whole, sizeof whole);
    }
    for (; i < d; i++)
        q[i] = (int8_t)lrintf(fmaxf(fminf(x[i] / scale, 127), -127));
    return word;
}

/* n rows (n, d) into a slab from entry `at` on. */
INLINE void pack_rows(const int format, const float *rows, int64_t n, int64_t d, const Slab *slab, int values, int64_t at)
{
    char *to = row_of(format, slab, values, at, d);
    if (format == ROW_F32)
        memcpy(to, rows, sizeof(float) * (size_t)(n * d));
    else if (format == ROW_BF16)
        kernels->bf16_from(rows, n * d, (uint16_t *)to);
    else if (format == ROW_I8)
        for (int64_t i = 0; i < n; i++)
            slab->scales[values][at + i] = to_i8(rows + i * d, d, (int8_t *)to + i * d);
    else
        for (int64_t i = 0; i < n; i++) {
            float x[d];
            memcpy(x, rows + i * d, sizeof x);
            hadamard(x, d);
            slab->scales[values][at + i] = to_levels(bits_of(format), x, d, (uint8_t *)to + i * row_bytes(format, d));
        }
}

#endif
