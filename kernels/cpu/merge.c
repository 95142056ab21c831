/* Weighted sums of rows, wherever they lie: any Plan.
 *
 * Each task owns a stretch of entries and looks through all of `dest` for them: reading 8 bytes a row again is cheaper than sorting,
 * and rows are added in their order, so that the result does not depend on the threads. */
#include "rotate.h"
#include "rows.h"

typedef struct {
    const Merge *m;
    int64_t a_task;
} Tasks;

INLINE int64_t stored(const StoredRows *rows, int64_t head) { return rows->start ? rows->past.lengths[head] - rows->start[head] : 0; }

/* Row i of a head (d,), its first `stored` rows in pages: where it is, or widened into `room`. */
INLINE const float *row_at(const StoredRows *rows, int64_t head, int64_t i, int64_t stored, float *room)
{
    const int64_t d = rows->d;
    if (i >= stored)
        return rows->fresh + (head * rows->n + i - stored) * d;
    const Slab *slab;
    const int64_t at = entry_of(&rows->past, head, rows->start[head] + i, &slab);
    return widened(rows->values ? rows->past.values : rows->past.keys, slab, (int)rows->values, at, d, room);
}

INLINE void add(float *out, const float *row, float weight, int64_t d)
{
    int64_t i = 0;
    for (; i + VW <= d; i += VW)
        store(out + i, load(out + i) + splat(weight) * load(row + i));
    for (; i < d; i++)
        out[i] += weight * row[i];
}

/* Entries lo .. hi - 1: rows as they are. */
static void sums(const Merge *m, int64_t lo, int64_t hi, float *room)
{
    const StoredRows *rows = &m->rows;
    for (int64_t head = 0, r = 0; head < rows->n_heads; head++) {
        const int64_t in_pages = stored(rows, head);
        for (int64_t i = 0; i < in_pages + rows->n; i++, r++)
            if (m->dest[r] >= lo && m->dest[r] < hi)
                add(m->out + m->dest[r] * rows->d, row_at(rows, head, i, in_pages, room), m->weight[r], rows->d);
    }
}

/* The same of keys: summed with RoPE undone, and then turned to the position of their entry. */
static void unrotated_sums(const Merge *m, int64_t lo, int64_t hi, float *room, int thread)
{
    const StoredRows *rows = &m->rows;
    const int64_t d = rows->d, half = d / 2;
    float *turned = scratch(thread, 2, sizeof(float) * (size_t)d);
    int32_t *made_of = scratch(thread, 3, sizeof(int32_t) * (size_t)(hi - lo)); /* rows of each entry; 0 once it is a copy */
    memset(made_of, 0, sizeof(int32_t) * (size_t)(hi - lo));
    for (int64_t r = 0; r < m->n_rows; r++)
        if (m->dest[r] >= lo && m->dest[r] < hi)
            made_of[m->dest[r] - lo]++;
    for (int64_t head = 0, r = 0; head < rows->n_heads; head++) {
        const int64_t in_pages = stored(rows, head);
        for (int64_t i = 0; i < in_pages + rows->n; i++, r++) {
            const int64_t entry = m->dest[r], at = m->pos[r] * half;
            if (entry < lo || entry >= hi)
                continue;
            const float *row = row_at(rows, head, i, in_pages, room);
            if (made_of[entry - lo] == 1 && m->weight[r] == 1 && m->entry_pos[entry] == m->pos[r]) {
                memcpy(m->out + entry * d, row, sizeof(float) * (size_t)d);
                made_of[entry - lo] = 0;
                continue;
            }
            unrotate(row, m->cos + at, m->sin + at, m->cos, turned, half);
            add(m->out + entry * d, turned, m->weight[r], d);
        }
    }
    for (int64_t entry = lo; entry < hi; entry++)
        if (made_of[entry - lo]) {
            const int64_t at = m->entry_pos[entry] * half;
            rotate(m->out + entry * d, m->cos + at, m->sin + at, m->out + entry * d, half);
        }
}

static void entries(void *context, int64_t task, int thread)
{
    const Tasks *c = context;
    const Merge *m = c->m;
    const int64_t lo = task * c->a_task, hi = least(lo + c->a_task, m->n_entries), d = m->rows.d;
    float *room = scratch(thread, 0, sizeof(float) * (size_t)d);
    memset(m->out + lo * d, 0, sizeof(float) * (size_t)((hi - lo) * d));
    if (m->pos)
        unrotated_sums(m, lo, hi, room, thread);
    else
        sums(m, lo, hi, room);
}

void FN(merge)(const Merge *m)
{
    Tasks c = {m, most(256, (m->n_entries + pool_threads() - 1) / pool_threads())};
    parallel((m->n_entries + c.a_task - 1) / c.a_task, entries, &c);
}
