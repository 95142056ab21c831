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

typedef struct {
    const float *keys;
    int64_t n, d;
    float *unit;
} Unit;

enum { ROWS = 256 }; /* a task */

static void some_rows(void *context, int64_t task, int thread)
{
    (void)thread;
    const Unit *c = context;
    for (int64_t r = task * ROWS; r < least((task + 1) * ROWS, c->n); r++) {
        const float *key = c->keys + r * c->d, norm = sqrtf(dot(key, key, c->d));
        for (int64_t i = 0; i < c->d; i++)
            c->unit[r * c->d + i] = norm > 0 ? key[i] / norm : 0;
    }
}

/* unit (n, d) = keys / their norms; a key of norm zero stays zero. */
void FN(unit_rows)(const float *keys, int64_t n, int64_t d, float *unit)
{
    Unit c = {keys, n, d, unit};
    parallel((n + ROWS - 1) / ROWS, some_rows, &c);
}

/* out (n,) = a . b (n, d), n 1 or 4: summed in one order, so that equal keys have equal cosines wherever they stand; at most 1, which the
 * sum of rounded products may exceed. */
INLINE void dots(const float *a, const float *b, int64_t d, const int n, float *out)
{
    vf totals[4] = {splat(0), splat(0), splat(0), splat(0)};
    float sums[4];
    int64_t i = 0;
    for (; i + VW <= d; i += VW)
        for (int j = 0; j < n; j++)
            totals[j] += load(a + i) * load(b + j * d + i);
    sum4(totals, sums);
    for (int j = 0; j < n; j++) {
        for (int64_t k = i; k < d; k++)
            sums[j] += a[k] * b[j * d + k];
        out[j] = fminf(sums[j], 1);
    }
}

/* out (hi - lo,) = unit[row] . unit[lo .. hi - 1] */
void FN(cosines)(const float *unit, int64_t d, int64_t row, int64_t lo, int64_t hi, float *out)
{
    int64_t r = lo;
    for (; r + 4 <= hi; r += 4)
        dots(unit + row * d, unit + r * d, d, 4, out + r - lo);
    for (; r < hi; r++)
        dots(unit + row * d, unit + r * d, d, 1, out + r - lo);
}
