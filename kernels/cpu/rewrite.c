/* Entries that become sums of themselves, where they lie in pages.
 *
 * A task is K or V of a head. What it reads and what it writes are the same pages: it writes when all is read and summed. */
#include "rows.h"

static void sum_pages(const Rewrite *w, int64_t head, int values, const int64_t *dest, const float *weight, int64_t first, float *sums, float *room)
{
    const int64_t d = w->d, size = w->within.page_size, end = w->within.lengths[head];
    for (int64_t i = w->start[head], n; i < end; i += n, dest += n, weight += n) {
        const Slab *slab;
        const int64_t at = entry_of(&w->within, head, i, &slab);
        n = least(size - i % size, end - i);
        for (int64_t j = 0; j < n; j++) {
            if (dest[j] < 0 || weight[j] == 0)
                continue;
            const float *row = widened(values ? w->within.values : w->within.keys, slab, values, at + j, d, room);
            float *sum = sums + (dest[j] - first) * d;
            int64_t k = 0;
            for (; k + VW <= d; k += VW)
                store(sum + k, load(sum + k) + splat(weight[j]) * load(row + k));
            for (; k < d; k++)
                sum[k] += weight[j] * row[k];
        }
    }
}

static void field(void *context, int64_t task, int thread)
{
    const Rewrite *w = context;
    const int64_t head = task / 2, values = task % 2, d = w->d, size = w->within.page_size, start = w->start[head];
    int64_t row = 0, first = 0; /* of the head: its first row, its first entry */
    for (int64_t before = 0; before < head; before++) {
        row += w->within.lengths[before] - w->start[before];
        first += w->lengths[before];
    }
    float *sums = scratch(thread, 0, sizeof(float) * (size_t)(w->lengths[head] * d));
    const float *weight = (values ? w->value_weight : w->key_weight) + row;
    memset(sums, 0, sizeof(float) * (size_t)(w->lengths[head] * d));
    sum_pages(w, head, (int)values, w->dest + row, weight, first, sums, scratch(thread, 1, sizeof(float) * (size_t)d));
    for (int64_t i = start, n; i < start + w->lengths[head]; i += n) {
        const Slab *slab;
        const int64_t at = entry_of(&w->within, head, i, &slab), entry = first + i - start;
        n = least(size - i % size, start + w->lengths[head] - i);
        kernels->store_rows(sums + (i - start) * d, n, d, &w->within, slab, (int)values, at);
        if (values)
            continue;
        memcpy(slab->log_size + at, w->log_size + entry, sizeof(float) * (size_t)n);
        memcpy(slab->pos + at, w->pos + entry, sizeof(int32_t) * (size_t)n);
    }
}

void FN(rewrite)(const Rewrite *w) { parallel(2 * w->n_heads, field, (void *)w); }
