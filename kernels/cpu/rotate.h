/* Rotation of one row by RoPE, half-split, and back. */
#ifndef MINILLM_ROTATE_H
#define MINILLM_ROTATE_H

#include "simd.h"

/* y (2 half,) = the halves of x turned by cos, sin (half,), or back if sign is -1; y may be x. */
INLINE void rotate(const float *x, const float *cos, const float *sin, const float sign, float *y, int64_t half)
{
    int64_t i = 0;
    for (; i + VW <= half; i += VW) {
        const vf a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i) * splat(sign);
        store(y + i, a * c - b * s);
        store(y + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        const float a = x[i], b = x[half + i], s = sin[i] * sign;
        y[i] = a * cos[i] - b * s;
        y[half + i] = b * cos[i] + a * s;
    }
}

#endif
