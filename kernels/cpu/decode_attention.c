/* Attention of one token of each of B sequences over its stored entries: softmax(q.k scale + log s) v, over pages.
 *
 * A task is a stretch of pages of one KV head: K and V are read from memory once for all query heads of the group. Long heads are
 * cut into stretches, so that heads of very different lengths keep all threads busy; each leaves (maximum, sum, weighted values)
 * and the stretches of a head are put together at the end. The arithmetic is float32. */
#include "rows.h"

#include <float.h>

enum { MIN_PAGES = 4, TASKS_A_THREAD = 16, MAX_GROUP = 4 }; /* MAX_GROUP: query heads a pass over a page */

typedef struct {
    int32_t batch, head, first, end; /* pages first .. end - 1 */
} Stretch;

typedef struct {
    const DecodeAttention *a;
    const Stretch *stretches;
    float *partial; /* (stretches, G, d + 2): weighted values, maximum, sum */
} Attention;

/* Asks for entries of the next page while those of this page are read: a page is too short for the processor to see the next coming. */
INLINE void fetch(const char *p, int64_t bytes)
{
    for (int64_t line = 0; line < bytes; line += 64)
        __builtin_prefetch(p + line);
}

#define UNROLLED _Pragma("GCC unroll 16")

/* s (g, n) = q (g, d) . k (n, d), 4 entries at a time, the last once more where n ends. ahead: bytes from this page to the next. */
INLINE void dots(const int format, const int g, const float *q, const char *k, int64_t ahead, int64_t n, int64_t d, float *s, int64_t s_stride)
{
    for (int64_t e = 0; e < n; e += 4) {
        const char *rows[4];
        for (int j = 0; j < 4; j++)
            rows[j] = k + least(e + j, n - 1) * row_bytes(format, d);
        fetch(rows[0] + ahead, 4 * row_bytes(format, d));
        vf sums[MAX_GROUP][4];
        UNROLLED
        for (int h = 0; h < g; h++)
            UNROLLED
            for (int j = 0; j < 4; j++)
                sums[h][j] = splat(0);
        int64_t i = 0;
        for (; i + VW <= d; i += VW) {
            vf x[4];
            UNROLLED
            for (int j = 0; j < 4; j++)
                x[j] = load_row(format, rows[j], i);
            UNROLLED
            for (int h = 0; h < g; h++) {
                vf part = load(q + h * d + i);
                UNROLLED
                for (int j = 0; j < 4; j++)
                    sums[h][j] += x[j] * part;
            }
        }
        for (int h = 0; h < g; h++) {
            float *out = s + h * s_stride + e;
            sum4(sums[h], out);
            for (int64_t c = i; c < d; c++)
                for (int j = 0; j < 4; j++)
                    out[j] += load_row_one(format, rows[j], c) * q[h * d + c];
        }
    }
}

enum { WIDE = 4 }; /* vectors of V held at once: 16 sums for a group of 4 */

/* out (g, d), rows out_stride apart, += p (g, n) v (n, d) */
INLINE void weigh(const int format, const int g, const float *p, int64_t p_stride, const char *v, int64_t ahead, int64_t n, int64_t d, float *out, int64_t out_stride)
{
    int64_t i = 0;
    for (; i + WIDE * VW <= d; i += WIDE * VW) {
        vf sums[MAX_GROUP][WIDE];
        for (int h = 0; h < g; h++)
            for (int w = 0; w < WIDE; w++)
                sums[h][w] = load(out + h * out_stride + i + w * VW);
        for (int64_t e = 0; e < n; e++) {
            const char *row = v + e * row_bytes(format, d);
            if (i == 0)
                fetch(row + ahead, row_bytes(format, d));
            vf x[WIDE];
            for (int w = 0; w < WIDE; w++)
                x[w] = load_row(format, row, i + w * VW);
            for (int h = 0; h < g; h++)
                for (int w = 0; w < WIDE; w++)
                    sums[h][w] += splat(p[h * p_stride + e]) * x[w];
        }
        for (int h = 0; h < g; h++)
            for (int w = 0; w < WIDE; w++)
                store(out + h * out_stride + i + w * VW, sums[h][w]);
    }
    for (; i < d; i++)
        for (int h = 0; h < g; h++)
            for (int64_t e = 0; e < n; e++)
                out[h * out_stride + i] += p[h * p_stride + e] * load_row_one(format, v + e * row_bytes(format, d), i);
}

/* What there is to know of a page's entries beside their rows: log s, -inf for what is out of sight, and what K and V are to be
 * multiplied by. */
typedef struct {
    float *bias, *k_scale, *v_scale;
} Known;

/* Heads' weights of n entries, times the scales of their values, from their logits s (g, n) without the scales of their keys: online
 * softmax with the maximum and sum behind each row of `partial`. */
static void weights(float *s, int64_t s_stride, int64_t g, int64_t n, const Known *known, float *partial, int64_t d)
{
    for (int64_t h = 0; h < g; h++) {
        float *row = s + h * s_stride, *values = partial + h * (d + 2);
        for (int64_t e = n; e < round_up(n, VW); e++)
            row[e] = -INFINITY, known->k_scale[e] = 1;
        vf high = splat(-INFINITY);
        for (int64_t e = 0; e < n; e += VW) {
            vf logits = load(row + e) * load(known->k_scale + e) + load(known->bias + e);
            store(row + e, logits);
            high = vmax(high, logits);
        }
        float peak = largest(high);
        if (peak > values[d]) {
            float shrink = expf(values[d] - peak);
            for (int64_t i = 0; i < d; i++)
                values[i] *= shrink;
            values[d] = peak;
            values[d + 1] *= shrink;
        }
        vf total = splat(0), top = splat(values[d]);
        for (int64_t e = 0; e < n; e += VW) {
            vf p = expv(load(row + e) - top);
            store(row + e, p * load(known->v_scale + e));
            total += p;
        }
        values[d + 1] += sum(total);
    }
}

#define FOR_GROUP(call)        \
    switch (g) {               \
    case 1: call(1); break;    \
    case 2: call(2); break;    \
    case 3: call(3); break;    \
    default: call(4); break;   \
    }
#define DOTS(g) dots(format, g, q, k->rows, k->ahead, n, d, s, s_stride)
#define WEIGH(g) weigh(format, g, p, p_stride, v->rows, v->ahead, n, d, out, d + 2)

/* K or V of a page: numbers that lie one by one, of which format, and the bytes from them to those of the next page. */
typedef struct {
    int format;
    const char *rows;
    int64_t ahead;
} Numbers;

INLINE void dots_of_heads(const int format, int64_t g, const float *q, const Numbers *k, int64_t n, int64_t d, float *s, int64_t s_stride) { FOR_GROUP(DOTS) }
#define DOTS_OF_HEADS(format) dots_of_heads(format, g, q, k, n, d, s, s_stride)

INLINE void weigh_for_heads(const int format, int64_t g, const float *p, int64_t p_stride, const Numbers *v, int64_t n, int64_t d, float *out) { FOR_GROUP(WEIGH) }
#define WEIGH_FOR_HEADS(format) weigh_for_heads(format, g, s, s_stride, v, n, d, partial)

/* One page of n entries for g query heads. */
static void page_of_heads(int64_t g, const float *q, const Numbers *k, const Numbers *v, const Known *known, int64_t n, int64_t d, float *s, int64_t s_stride,
                          float *partial)
{
    BY_NUMBERS(k->format, DOTS_OF_HEADS)
    weights(s, s_stride, g, n, known, partial, d);
    BY_NUMBERS(v->format, WEIGH_FOR_HEADS)
}

typedef struct {
    const Slab *slab;
    int64_t at; /* of its first entry */
    const char *k, *v;
} Page;

/* The Numbers of n rows of a page, `next` those of the next page; in room (n, d) where they do not lie one by one. */
static Numbers numbers(int format, const char *rows, const char *next, int64_t n, int64_t d, int8_t *room)
{
    if (!turned(format))
        return (Numbers){format, rows, next - rows};
    fetch(next, n * row_bytes(format, d));
    return (Numbers){one_by_one(format), numbers_of_any(format, rows, n, d, room), 0};
}

static Page page_at(const Paged *past, int64_t page, int64_t d)
{
    const Slab *slab = &past->slabs[page / past->slab_pages];
    const int64_t at = page % past->slab_pages * past->page_size;
    return (Page){slab, at, row_of(past->keys, slab, 0, at, d), row_of(past->values, slab, 1, at, d)};
}

static void stretch(void *context, int64_t task, int thread)
{
    const Attention *c = context;
    const DecodeAttention *a = c->a;
    const Stretch *t = &c->stretches[task];
    const Paged *past = &a->past[t->batch];
    const int64_t d = a->head_dim, group = a->n_heads / a->n_kv_heads, size = past->page_size, s_stride = round_up(size, VW);
    const int32_t hidden = a->window ? (int32_t)(past->seen - a->window) : INT32_MIN; /* positions up to it are out of sight */
    float *q = scratch(thread, 2, sizeof(float) * (size_t)(group * d));
    float *s = scratch(thread, 3, sizeof(float) * (size_t)((MAX_GROUP + 3) * s_stride)), *beside = s + MAX_GROUP * s_stride;
    int8_t *room = scratch(thread, 4, (size_t)(2 * (size * d + 32)));
    const Known known = {beside, beside + s_stride, beside + 2 * s_stride};
    for (int64_t i = 0; i < 3 * s_stride; i++)
        beside[i] = 1; /* the scales, where there are none */
    float *partial = c->partial + task * group * (d + 2);
    for (int64_t h = 0; h < group; h++) {
        for (int64_t i = 0; i < d; i++) {
            q[h * d + i] = a->q[((int64_t)t->batch * a->n_heads + t->head * group + h) * d + i] * a->scale;
            partial[h * (d + 2) + i] = 0;
        }
        if (turned(past->keys))
            hadamard(q + h * d, d);
        partial[h * (d + 2) + d] = -FLT_MAX;
        partial[h * (d + 2) + d + 1] = 0;
    }
    const int32_t *pages = past->pages + t->head * past->capacity;
    Page page, next = page_at(past, pages[t->first], d);
    for (int64_t i = t->first; i < t->end; i++) {
        const int64_t n = least(size, past->lengths[t->head] - i * size);
        page = next;
        next = page_at(past, pages[least(i + 1, t->end - 1)], d);
        for (int64_t e = 0; e < n; e++) {
            float log_size = page.slab->log_size[page.at + e];
            known.bias[e] = page.slab->pos[page.at + e] <= hidden ? -INFINITY : log_size;
        }
        for (int64_t e = 0; scaled(past->keys) && e < n; e++)
            known.k_scale[e] = row_scale(past->keys, page.slab, 0, page.at + e);
        for (int64_t e = 0; scaled(past->values) && e < n; e++)
            known.v_scale[e] = row_scale(past->values, page.slab, 1, page.at + e);
        const Numbers k = numbers(past->keys, page.k, next.k, n, d, room), v = numbers(past->values, page.v, next.v, n, d, room + size * d + 32);
        for (int64_t h = 0; h < group; h += MAX_GROUP)
            page_of_heads(least(MAX_GROUP, group - h), q + h * d, &k, &v, &known, n, d, s, s_stride, partial + h * (d + 2));
    }
}

void FN(decode_attention)(const DecodeAttention *a)
{
    const int64_t d = a->head_dim, group = a->n_heads / a->n_kv_heads;
    int64_t all = 0, count = 0;
    for (int64_t i = 0; i < (int64_t)a->batch * a->n_kv_heads; i++) {
        const Paged *past = &a->past[i / a->n_kv_heads];
        all += (past->lengths[i % a->n_kv_heads] + past->page_size - 1) / past->page_size;
    }
    const int64_t at_once = most(MIN_PAGES, all / (TASKS_A_THREAD * pool_threads()));
    const int64_t room = all / at_once + (int64_t)a->batch * a->n_kv_heads;
    Stretch *stretches = scratch(SHARED, 2, sizeof(Stretch) * (size_t)room);
    float *partial = scratch(SHARED, 3, sizeof(float) * (size_t)(room * group * (d + 2)));
    for (int32_t b = 0; b < a->batch; b++)
        for (int32_t head = 0; head < a->n_kv_heads; head++) {
            int64_t pages = (a->past[b].lengths[head] + a->past[b].page_size - 1) / a->past[b].page_size;
            for (int64_t first = 0; first < pages; first += at_once)
                stretches[count++] = (Stretch){b, head, (int32_t)first, (int32_t)least(first + at_once, pages)};
        }
    Attention c = {a, stretches, partial};
    parallel(count, stretch, &c);
    memset(a->out, 0, sizeof(float) * (size_t)(a->batch * a->n_heads * d));
    for (int64_t first = 0, end; first < count; first = end) {
        for (end = first + 1; end < count && stretches[end].batch == stretches[first].batch && stretches[end].head == stretches[first].head;)
            end++;
        for (int64_t h = 0; h < group; h++) {
            float *out = a->out + ((int64_t)stretches[first].batch * a->n_heads + stretches[first].head * group + h) * d;
            float peak = -FLT_MAX, total = 0;
            for (int64_t i = first; i < end; i++)
                peak = fmaxf(peak, partial[(i * group + h) * (d + 2) + d]);
            for (int64_t i = first; i < end; i++) {
                const float *values = partial + (i * group + h) * (d + 2);
                float share = expf(values[d] - peak);
                total += share * values[d + 1];
                for (int64_t j = 0; j < d; j++)
                    out[j] += share * values[j];
            }
            for (int64_t j = 0; j < d; j++)
                out[j] /= total;
            if (turned(a->past[stretches[first].batch].values))
                hadamard(out, d);
        }
    }
}
