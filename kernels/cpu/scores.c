/* How much of the attention of given queries goes to each row of a layer: the softmax probabilities themselves (the last w queries),
 * or their sum or largest over many queries, without a matrix of queries times rows.
 *
 * One KV head after another: rows and queries are packed as operands of mm.h; then 32 queries of one query head are a task that finds
 * what normalises each of them (online, Milakov & Gimelshein 2018); then KEYS rows and one query head are a task that goes through
 * the queries again and alone writes the scores of these rows. Logits are in base 2. */
#include "mm.h"

#include <float.h>

enum { QUERIES = 32, KEYS = 128 };
#define LOG2E 1.44269504f

typedef struct {
    int32_t oldest, newest;
} Span; /* positions in a block of rows or of queries */

typedef struct {
    const Scores *a;
    int64_t head, first, n_rows;     /* KV head, its rows */
    int64_t d, key_blocks, query_blocks;
    mm_t *keys;                      /* (key_blocks * KEYS / 16) panels */
    mm_t *q;                         /* (G, query_blocks * QUERIES, d) left operand */
    float *bias;                     /* (key_blocks * KEYS,) log2 s; -inf for padding */
    int32_t *pos;
    float *peak, *spread;            /* (G, query_blocks * QUERIES): the log of a query's sum is peak + spread, kept apart: of large
                                        logits the sum would lose spread. Spread is inf where a query sees nothing */
    Span *key_span, *query_span;
} Head;

static Span span(const int32_t *pos, int64_t n)
{
    Span s = {INT32_MAX, INT32_MIN};
    for (int64_t i = 0; i < n; i++) {
        s.oldest = (int32_t)least(s.oldest, pos[i]);
        s.newest = (int32_t)most(s.newest, pos[i]);
    }
    return s;
}

static void pack_keys(const Head *h, int64_t block)
{
    const Scores *a = h->a;
    const int64_t lo = block * KEYS, n = least(KEYS, h->n_rows - lo);
    for (int64_t i = 0; i < KEYS; i++) {
        h->bias[lo + i] = i < n ? a->log_size[h->first + lo + i] * LOG2E : -INFINITY;
        h->pos[lo + i] = i < n ? a->pos[h->first + lo + i] : INT32_MAX;
    }
    for (int64_t panel = 0; panel < KEYS; panel += PANEL) {
        const void *rows[PANEL];
        for (int64_t i = 0; i < PANEL; i++)
            rows[i] = panel + i < n ? a->keys + (h->first + lo + panel + i) * a->head_dim : NULL;
        FN(mm_pack_rows)(F32, rows, a->head_dim, h->keys + (lo + panel) * h->d);
    }
    h->key_span[block] = span(h->pos + lo, n);
}

static void pack_queries(const Head *h, int64_t g, int64_t block)
{
    const Scores *a = h->a;
    const int64_t lo = block * QUERIES, n = least(QUERIES, a->n - lo), group = a->n_heads / a->n_kv_heads;
    const int64_t from = (h->head * group + g) * a->n + lo, to = (g * h->query_blocks + block) * QUERIES;
    for (int64_t i = 0; i < QUERIES; i++) {
        FN(mm_left_row)(F32, a->q + (from + i) * a->head_dim, i < n ? a->head_dim : 0, h->q, h->d, to + i);
        if (a->lse && i < n) {
            const int sees = a->lse[from + i] > -INFINITY;
            h->peak[to + i] = sees ? a->lse[from + i] * LOG2E : 0;
            h->spread[to + i] = sees ? 0 : INFINITY;
        }
    }
    if (g == 0)
        h->query_span[block] = span(a->q_pos + lo, n);
}

static void pack(void *context, int64_t task, int thread)
{
    (void)thread;
    const Head *h = context;
    if (task < h->key_blocks)
        pack_keys(h, task);
    else
        pack_queries(h, (task - h->key_blocks) / h->query_blocks, (task - h->key_blocks) % h->query_blocks);
}

/* What a query at position `query` sees: rows at positions in (hidden, newest]. */
INLINE int32_t hidden(const Scores *a, int32_t query) { return a->window ? query - a->window : INT32_MIN; }

/* Whether some query of a block sees some row of another, and whether all see all, if only rows at least `distance` positions before
 * a query count. */
INLINE int some(const Scores *a, Span keys, Span queries, int32_t distance)
{
    return keys.oldest <= queries.newest - distance && keys.newest > hidden(a, queries.oldest);
}
INLINE int all(const Scores *a, Span keys, Span queries, int32_t distance)
{
    return keys.newest <= queries.oldest - distance && keys.oldest > hidden(a, queries.newest);
}

/* VW logits of a query and the rows from `key` on: s is q.k. */
INLINE vf logit(const Head *h, const float *s, int64_t key, int whole, int32_t newest, int32_t oldest)
{
    vf x = load(s) * splat(h->a->scale * LOG2E) + load(h->bias + key);
    if (whole)
        return x;
    vi pos = load_i(h->pos + key);
    vi visible = (pos <= (vi)splat_u((uint32_t)newest)) & (pos > (vi)splat_u((uint32_t)oldest));
    return choose(visible, x, splat(-INFINITY));
}

static void normalise(void *context, int64_t task, int thread)
{
    const Head *h = context;
    const Scores *a = h->a;
    const int64_t group = a->n_heads / a->n_kv_heads, block = h->query_blocks - 1 - task / group;
    const int64_t lo = block * QUERIES, rows = least(QUERIES, a->n - lo), at = task % group * h->query_blocks * QUERIES + lo;
    float *s = scratch(thread, 3, sizeof(float) * QUERIES * KEYS);
    float *peak = h->peak + at, total[QUERIES];
    for (int64_t i = 0; i < rows; i++)
        peak[i] = -FLT_MAX, total[i] = 0;
    FN(mm_begin)();
    for (int64_t b = 0; b < h->key_blocks; b++) {
        if (!some(a, h->key_span[b], h->query_span[block], 0))
            continue;
        const int whole = all(a, h->key_span[b], h->query_span[block], 0);
        FN(mm)(h->q + at * h->d, h->d, h->keys + b * KEYS * h->d, PANEL * h->d, s, KEYS, rows, KEYS / PANEL, h->d, 0);
        for (int64_t i = 0; i < rows; i++) {
            float *row = s + i * KEYS;
            const int32_t query = a->q_pos[lo + i];
            vf high[2] = {splat(peak[i]), splat(peak[i])}, sums[2] = {splat(0), splat(0)};
            for (int64_t j = 0; j < KEYS; j += 2 * VW)
                for (int half = 0; half < 2; half++) {
                    vf x = logit(h, row + j + half * VW, b * KEYS + j + half * VW, whole, query, hidden(a, query));
                    store(row + j + half * VW, x);
                    high[half] = vmax(high[half], x);
                }
            const float top = largest(vmax(high[0], high[1]));
            for (int64_t j = 0; j < KEYS; j += 2 * VW)
                for (int half = 0; half < 2; half++)
                    sums[half] += exp2v(load(row + j + half * VW) - splat(top));
            total[i] = total[i] * exp2f(peak[i] - top) + sum(sums[0] + sums[1]);
            peak[i] = top;
        }
    }
    FN(mm_end)();
    for (int64_t i = 0; i < rows; i++)
        h->spread[at + i] = total[i] > 0 ? log2f(total[i]) : INFINITY;
}

/* Collects the products s (rows, KEYS) of a block of queries into `score` (KEYS,): logs of the largest probabilities, or sums; or, without
 * a reduction, leaves the probabilities in s. */
INLINE void collect(const Head *h, float *s, float *score, int64_t at, int64_t lo, int64_t rows, int64_t key, const int reduce, const int whole)
{
    const Scores *a = h->a;
    for (int64_t j = 0; j < KEYS; j += VW) {
        vf column = load(score + j);
        for (int64_t i = 0; i < rows; i++) {
            const int32_t query = a->q_pos[lo + i];
            vf x = logit(h, s + i * KEYS + j, key + j, whole, query - a->min_distance, hidden(a, query));
            x = x - splat(h->peak[at + i]) - splat(h->spread[at + i]);
            if (reduce == REDUCE_MAX)
                column = vmax(column, x);
            else if (reduce == REDUCE_SUM)
                column += exp2v(x);
            else
                store(s + i * KEYS + j, exp2v(x));
        }
        store(score + j, column);
    }
}

static void columns(void *context, int64_t task, int thread)
{
    const Head *h = context;
    const Scores *a = h->a;
    const int64_t group = a->n_heads / a->n_kv_heads, g = task % group, b = task / group, key = b * KEYS;
    const size_t bytes = sizeof(float) * (size_t)least(KEYS, h->n_rows - key); /* of scores that are written */
    float *s = scratch(thread, 3, sizeof(float) * QUERIES * KEYS), score[KEYS];
    for (int64_t j = 0; j < KEYS; j++)
        score[j] = a->reduce == REDUCE_MAX ? -INFINITY : 0;
    FN(mm_begin)();
    for (int64_t block = 0; block < h->query_blocks; block++) {
        if (!some(a, h->key_span[b], h->query_span[block], a->min_distance))
            continue;
        const int whole = all(a, h->key_span[b], h->query_span[block], a->min_distance);
        const int64_t lo = block * QUERIES, rows = least(QUERIES, a->n - lo), at = g * h->query_blocks * QUERIES + lo;
        FN(mm)(h->q + at * h->d, h->d, h->keys + key * h->d, PANEL * h->d, s, KEYS, rows, KEYS / PANEL, h->d, 0);
        if (a->reduce == REDUCE_SUM && whole)
            collect(h, s, score, at, lo, rows, key, REDUCE_SUM, 1);
        else if (a->reduce == REDUCE_SUM)
            collect(h, s, score, at, lo, rows, key, REDUCE_SUM, 0);
        else if (a->reduce == REDUCE_MAX && whole)
            collect(h, s, score, at, lo, rows, key, REDUCE_MAX, 1);
        else if (a->reduce == REDUCE_MAX)
            collect(h, s, score, at, lo, rows, key, REDUCE_MAX, 0);
        else
            collect(h, s, score, at, lo, rows, key, REDUCE_NONE, 0);
        for (int64_t i = 0; a->reduce == REDUCE_NONE && i < rows; i++)
            memcpy(a->out + (g * a->n + lo + i) * a->n_rows + h->first + key, s + i * KEYS, bytes);
    }
    FN(mm_end)();
    if (a->reduce == REDUCE_MAX)
        for (int64_t j = 0; j < KEYS; j += VW)
            store(score + j, exp2v(load(score + j)));
    if (a->reduce != REDUCE_NONE)
        memcpy(a->out + g * a->n_rows + h->first + key, score, bytes);
}

void FN(scores)(const Scores *a)
{
    const int64_t group = a->n_heads / a->n_kv_heads;
    Head h = {.a = a, .d = round_up(a->head_dim, MM_K), .query_blocks = round_up(a->n, QUERIES) / QUERIES};
    const int64_t queries = group * h.query_blocks * QUERIES;
    h.q = scratch(SHARED, 3, sizeof(mm_t) * (size_t)(queries * h.d));
    h.peak = scratch(SHARED, 4, sizeof(float) * (size_t)(2 * queries));
    h.spread = h.peak + queries;
    for (h.head = 0; h.head < a->n_kv_heads; h.head++, h.first += h.n_rows) {
        h.n_rows = a->lengths[h.head];
        h.key_blocks = round_up(h.n_rows, KEYS) / KEYS;
        h.keys = scratch(SHARED, 2, sizeof(mm_t) * (size_t)(h.key_blocks * KEYS * h.d));
        h.bias = scratch(SHARED, 5, 8 * (size_t)(h.key_blocks * KEYS + h.key_blocks + h.query_blocks));
        h.pos = (int32_t *)(h.bias + h.key_blocks * KEYS);
        h.key_span = (Span *)(h.pos + h.key_blocks * KEYS);
        h.query_span = h.key_span + h.key_blocks;
        parallel(h.key_blocks + group * h.query_blocks, pack, &h);
        if (!a->lse)
            parallel(group * h.query_blocks, normalise, &h);
        parallel(group * h.key_blocks, columns, &h);
    }
}
