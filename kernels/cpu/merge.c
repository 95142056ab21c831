/* out[dest[r]] += weight[r] * rows[r] for dest[r] >= 0: any Plan. rows (n, d), dest, weight (n,), out (n_entries, d).
 *
 * Each task owns a stretch of entries and looks through all of `dest` for them: reading 8 bytes a row again is cheaper than sorting,
 * and rows are added in their order, so that the result does not depend on the threads. */
#include "minillm_cpu.h"
#include "simd.h"

typedef struct {
    const float *rows, *weight;
    const int64_t *dest;
    int64_t n, d, n_entries, a_task;
    float *out;
} Merge;

static void entries(void *context, int64_t task, int thread)
{
    (void)thread;
    const Merge *c = context;
    const int64_t lo = task * c->a_task, hi = least(lo + c->a_task, c->n_entries), d = c->d;
    memset(c->out + lo * d, 0, sizeof(float) * (size_t)((hi - lo) * d));
    for (int64_t r = 0; r < c->n; r++) {
        if (c->dest[r] < lo || c->dest[r] >= hi)
            continue;
        const float *row = c->rows + r * d;
        float *out = c->out + c->dest[r] * d, weight = c->weight[r];
        int64_t i = 0;
        for (; i + VW <= d; i += VW)
            store(out + i, load(out + i) + splat(weight) * load(row + i));
        for (; i < d; i++)
            out[i] += weight * row[i];
    }
}

void FN(merge)(const float *rows, const int64_t *dest, const float *weight, int64_t n, int64_t d, int64_t n_entries, float *out)
{
    Merge c = {rows, weight, dest, n, d, n_entries, most(256, (n_entries + pool_threads() - 1) / pool_threads()), out};
    parallel((n_entries + c.a_task - 1) / c.a_task, entries, &c);
}
