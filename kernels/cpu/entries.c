/* Entries of a layer into its pages. */
#include "rows.h"

#define PACK_ROWS(format) pack_rows(format, rows, n, d, slab, values, at)

void FN(store_rows)(const float *rows, int64_t n, int64_t d, const Paged *to, const Slab *slab, int values, int64_t at)
{
    BY_FORMAT(values ? to->values : to->keys, PACK_ROWS)
}

static int64_t pages_of(const Entries *e, int64_t head)
{
    const int64_t size = e->to.page_size, start = e->start[head], end = start + e->lengths[head];
    return end > start ? (end + size - 1) / size - start / size : 0;
}

/* One page; tasks count those of all heads that are written to. */
static void page(void *context, int64_t task, int thread)
{
    (void)thread;
    const Entries *e = context;
    const int64_t size = e->to.page_size, d = e->d;
    int64_t head = 0, row = 0; /* row: the first of the head */
    while (task >= pages_of(e, head)) {
        task -= pages_of(e, head);
        row += e->lengths[head++];
    }
    const int64_t start = e->start[head], lo = most(start, (start / size + task) * size);
    const int64_t n = least((lo / size + 1) * size, start + e->lengths[head]) - lo;
    const Slab *slab;
    const int64_t at = entry_of(&e->to, head, lo, &slab);
    row += lo - start;
    kernels->store_rows(e->k + row * d, n, d, &e->to, slab, 0, at);
    kernels->store_rows(e->v + row * d, n, d, &e->to, slab, 1, at);
    memcpy(slab->log_size + at, e->log_size + row, sizeof(float) * (size_t)n);
    memcpy(slab->pos + at, e->pos + row, sizeof(int32_t) * (size_t)n);
}

void FN(write_entries)(const Entries *e)
{
    int64_t pages = 0;
    for (int64_t head = 0; head < e->n_heads; head++)
        pages += pages_of(e, head);
    parallel(pages, page, (void *)e);
}
