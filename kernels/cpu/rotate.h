/* Rotation of one row by RoPE, half-split, and back. */
#ifndef MINILLM_ROTATE_H
#define MINILLM_ROTATE_H

#include "simd.h"

/* y (2 half,) = scale times the halves of x turned by cos, sin (half,), or back if sign is -1; y may be x. */
INLINE void rotate(const float *x, const float *cos, const float *sin, const float sign, const float scale, float *y, int64_t half)
{
    int64_t i = 0;
    for (; i + VW <= half; i += VW) {
        const vf a = load(x + i), b = load(x + half + i), c = load(cos + i) * splat(scale), s = load(sin + i) * splat(sign * scale);
        store(y + i, a * c - b * s);
        store(y + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        const float a = x[i], b = x[half + i], c = cos[i] * scale, s = sin[i] * (sign * scale);
        y[i] = a * c - b * s;
        y[half + i] = b * c + a * s;
    }
}

#endif
