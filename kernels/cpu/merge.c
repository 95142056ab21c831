/* Weighted sums of rows: any Plan.
 *
 * Each task owns a stretch of entries and looks through all of `dest` for them: reading 8 bytes a row again is cheaper than sorting,
 * and rows are added in their order, so that the result does not depend on the threads. */
#include "minillm_cpu.h"
#include "rotate.h"

typedef struct {
    const Merge *m;
    int64_t a_task;
} Tasks;

INLINE void add(float *out, const float *row, float weight, int64_t d)
{
    int64_t i = 0;
    for (; i + VW <= d; i += VW)
        store(out + i, load(out + i) + splat(weight) * load(row + i));
    for (; i < d; i++)
        out[i] += weight * row[i];
}

/* Entries lo .. hi - 1: rows as they are. */
static void sums(const Merge *m, int64_t lo, int64_t hi)
{
    for (int64_t r = 0; r < m->n; r++)
        if (m->dest[r] >= lo && m->dest[r] < hi)
            add(m->out + m->dest[r] * m->d, m->rows + r * m->d, m->weight[r], m->d);
}

/* The same of keys: summed with RoPE undone, and then turned to the position of their entry. */
static void unrotated_sums(const Merge *m, int64_t lo, int64_t hi, int thread)
{
    const int64_t d = m->d, half = d / 2;
    const float inverse = 1 / (m->cos[0] * m->cos[0]); /* of yarn's factor: position 0 shows it */
    float *turned = scratch(thread, 2, sizeof(float) * (size_t)d);
    int32_t *made_of = scratch(thread, 3, sizeof(int32_t) * (size_t)(hi - lo)); /* rows of each entry; 0 once it is a copy */
    memset(made_of, 0, sizeof(int32_t) * (size_t)(hi - lo));
    for (int64_t r = 0; r < m->n; r++)
        if (m->dest[r] >= lo && m->dest[r] < hi)
            made_of[m->dest[r] - lo]++;
    for (int64_t r = 0; r < m->n; r++) {
        const int64_t entry = m->dest[r], at = m->pos[r] * half;
        if (entry < lo || entry >= hi)
            continue;
        const float *row = m->rows + r * d;
        if (made_of[entry - lo] == 1 && m->weight[r] == 1 && m->entry_pos[entry] == m->pos[r]) {
            memcpy(m->out + entry * d, row, sizeof(float) * (size_t)d);
            made_of[entry - lo] = 0;
            continue;
        }
        rotate(row, m->cos + at, m->sin + at, -1, inverse, turned, half);
        add(m->out + entry * d, turned, m->weight[r], d);
    }
    for (int64_t entry = lo; entry < hi; entry++)
        if (made_of[entry - lo]) {
            const int64_t at = m->entry_pos[entry] * half;
            rotate(m->out + entry * d, m->cos + at, m->sin + at, 1, 1, m->out + entry * d, half);
        }
}

static void entries(void *context, int64_t task, int thread)
{
    const Tasks *c = context;
    const Merge *m = c->m;
    const int64_t lo = task * c->a_task, hi = least(lo + c->a_task, m->n_entries);
    memset(m->out + lo * m->d, 0, sizeof(float) * (size_t)((hi - lo) * m->d));
    if (m->pos)
        unrotated_sums(m, lo, hi, thread);
    else
        sums(m, lo, hi);
}

void FN(merge)(const Merge *m)
{
    Tasks c = {m, most(256, (m->n_entries + pool_threads() - 1) / pool_threads())};
    parallel((m->n_entries + c.a_task - 1) / c.a_task, entries, &c);
}
