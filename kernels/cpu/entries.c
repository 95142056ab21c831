/* Entries of a layer into its pages. */
#include "rows.h"

/* A row in 8 bits: q (d,) = x / scale to nearest, ties to even; scale is a bf16 word of max|x| / 127. */
static uint16_t to_i8(const float *x, int64_t d, int8_t *q)
{
    const float magic = 12582912.0f; /* 1.5 * 2^23: a sum with it has the nearest whole number in its low bits */
    float top = 0;
    int64_t i = 0;
    vf high = splat(0);
    for (; i + VW <= d; i += VW)
        high = vmax(high, (vf)((vu)load(x + i) & splat_u(0x7fffffff)));
    top = largest(high);
    for (; i < d; i++)
        top = fmaxf(top, fabsf(x[i]));
    const uint16_t word = bf16_of(top / 127);
    const float scale = word ? bf16_to_float(word) : 1;
    for (i = 0; i + VW <= d; i += VW) {
        vf units = load(x + i) / splat(scale);
        units = vmax(-vmax(-units, splat(-127)), splat(-127));
        const vb whole = __builtin_convertvector((vi)(units + splat(magic)) - (vi)splat(magic), vb);
        memcpy(q + i, &whole, sizeof whole);
    }
    for (; i < d; i++)
        q[i] = (int8_t)lrintf(fmaxf(fminf(x[i] / scale, 127), -127));
    return word;
}

void FN(store_rows)(const float *rows, int64_t n, int64_t d, const Paged *to, const Slab *slab, int values, int64_t at)
{
    char *field = (char *)(values ? slab->v : slab->k) + at * row_bytes(to->kind, d);
    if (to->kind == F32)
        memcpy(field, rows, sizeof(float) * (size_t)(n * d));
    else if (to->kind == BF16)
        kernels->bf16_from(rows, n * d, (uint16_t *)field);
    else
        for (int64_t i = 0; i < n; i++)
            (values ? slab->v_scale : slab->k_scale)[at + i] = to_i8(rows + i * d, d, (int8_t *)field + i * d);
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
