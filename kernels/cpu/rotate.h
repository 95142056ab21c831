/* Rotation of one row by RoPE, half-split, and back. */
#ifndef MINILLM_ROTATE_H
#define MINILLM_ROTATE_H

#include "simd.h"

/* y (2 half,) = the halves of x turned by cos, sin (half,); y may be x. */
INLINE void rotate(const float *x, const float *cos, const float *sin, float *y, int64_t half)
{
    int64_t i = 0;
    for (; i + VW <= half; i += VW) {
        const vf a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
        store(y + i, a * c - b * s);
        store(y + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        const float a = x[i], b = x[half + i], c = cos[i], s = sin[i];
        y[i] = a * c - b * s;
        y[half + i] = b * c + a * s;
    }
}

/* The way back. factor (half,): of each pair's cos and sin, as position 0 shows it in its cos. */
INLINE void unrotate(const float *x, const float *cos, const float *sin, const float *factor, float *y, int64_t half)
{
    int64_t i = 0;
    for (; i + VW <= half; i += VW) {
        const vf a = load(x + i), b = load(x + half + i), square = load(factor + i) * load(factor + i);
        const vf c = load(cos + i) / square, s = load(sin + i) / square;
        store(y + i, a * c + b * s);
        store(y + half + i, b * c - a * s);
    }
    for (; i < half; i++) {
        const float a = x[i], b = x[half + i], square = factor[i] * factor[i], c = cos[i] / square, s = sin[i] / square;
        y[i] = a * c + b * s;
        y[half + i] = b * c - a * s;
    }
}

#endif
