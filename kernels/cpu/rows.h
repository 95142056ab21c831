/* K or V of an entry in pages: floats, bf16 words, or whole numbers of 8 bits and their scale, as minillm.ops.pages says. */
#ifndef MINILLM_ROWS_H
#define MINILLM_ROWS_H

#include "minillm_cpu.h"
#include "simd.h"

/* `kind` is a constant wherever these are called in a loop. */
INLINE int64_t row_bytes(const int kind, int64_t d) { return d * (kind == F32 ? 4 : kind == BF16 ? 2 : 1); }

INLINE vf load_row(const int kind, const void *row, int64_t i)
{
    return kind == F32 ? load((const float *)row + i) : kind == BF16 ? load_bf16((const uint16_t *)row + i) : load_i8((const int8_t *)row + i);
}

INLINE float load_row_one(const int kind, const void *row, int64_t i)
{
    return kind == F32 ? ((const float *)row)[i] : kind == BF16 ? bf16_to_float(((const uint16_t *)row)[i]) : ((const int8_t *)row)[i];
}

/* Row `at` of K or V, widened (d,) unless it is of floats: where it is then. */
INLINE const float *widened(const int kind, const Slab *slab, int values, int64_t at, int64_t d, float *room)
{
    const char *row = (const char *)(values ? slab->v : slab->k) + at * row_bytes(kind, d);
    if (kind == F32)
        return (const float *)row;
    const float scale = kind == I8 ? bf16_to_float((values ? slab->v_scale : slab->k_scale)[at]) : 1;
    int64_t i = 0;
    for (; i + VW <= d; i += VW)
        store(room + i, load_row(kind, row, i) * splat(scale));
    for (; i < d; i++)
        room[i] = load_row_one(kind, row, i) * scale;
    return room;
}

#endif
