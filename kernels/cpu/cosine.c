/* What greedy clustering computes: rows of norm 1, and the cosines of one row with a stretch of others. */
#include "minillm_cpu.h"
#include "simd.h"

INLINE float dot(const float *a, const float *b, int64_t d)
{
    vf total = splat(0);
    int64_t i = 0;
    for (; i + VW <= d; i += VW)
        total += load(a + i) * load(b + i);
    float result = sum(total);
    for (; i < d; i++)
        result += a[i] * b[i];
    return result;
}

/* unit (n, d) = keys / their norms; a key of norm zero stays zero. */
void FN(unit_rows)(const float *keys, int64_t n, int64_t d, float *unit)
{
    for (int64_t r = 0; r < n; r++) {
        float norm = sqrtf(dot(keys + r * d, keys + r * d, d));
        for (int64_t i = 0; i < d; i++)
            unit[r * d + i] = norm > 0 ? keys[r * d + i] / norm : 0;
    }
}

/* out (hi - lo,) = unit[row] . unit[lo .. hi - 1], at most 1: the sum of rounded products may be more */
void FN(cosines)(const float *unit, int64_t d, int64_t row, int64_t lo, int64_t hi, float *out)
{
    for (int64_t r = lo; r < hi; r++)
        out[r - lo] = fminf(dot(unit + row * d, unit + r * d, d), 1);
}
