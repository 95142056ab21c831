/* Causal attention of n new tokens over stored entries and over one another: softmax(q.k scale + log s) v.
 *
 * One KV head after another: its keys (stored ones, padded to 32, then the new ones) are packed as operands of mm.h, then 32
 * queries of one query head are a task: blocks of KEYS keys pass through the L1 cache, the softmax is kept online (Milakov &
 * Gimelshein 2018), in base 2. Masked and padding keys have the logit -inf; the running maximum starts at -FLT_MAX, so that the
 * difference is never NaN. The last queries, which see most, are taken first. */
#include "mm.h"

#include <float.h>

enum { QUERIES = 32, KEYS = 128 };
#define LOG2E 1.44269504f

typedef struct {
    const PrefillAttention *a;
    int64_t head, past, total; /* KV head; stored keys padded to 32; with the new ones padded to KEYS */
    int64_t d_k, d_v;          /* head_dim padded for the two products */
    mm_t *keys;                /* (total / 16) panels */
    mm_t *values;              /* (d_v / 16) panels, total * 16 apart */
    float *bias;               /* (past,) log2 s; -inf for padding */
    int32_t *pos;              /* (past,) */
    int32_t *newest;           /* (total / KEYS) largest position in a block of keys */
} Attention;

static void pack(void *context, int64_t block, int thread)
{
    (void)thread;
    const Attention *c = context;
    const PrefillAttention *a = c->a;
    const Paged *past = &a->past;
    const int64_t d = a->head_dim, stored = past->lengths[c->head];
    int32_t newest = INT32_MIN;
    for (int64_t lo = block * KEYS; lo < (block + 1) * KEYS; lo += 32) {
        const void *k[32], *v[32];
        int old = lo < c->past, bf16 = old && past->bf16;
        for (int64_t i = 0; i < 32; i++) {
            int64_t key = lo + i;
            k[i] = v[i] = NULL;
            if (old) {
                c->bias[key] = -INFINITY;
                c->pos[key] = INT32_MIN;
                if (key >= stored)
                    continue;
                int64_t page = past->pages[c->head * past->capacity + key / past->page_size];
                const Slab *slab = &past->slabs[page / past->slab_pages];
                int64_t entry = page % past->slab_pages * past->page_size + key % past->page_size;
                k[i] = (const char *)slab->k + entry * d * (bf16 ? 2 : 4);
                v[i] = (const char *)slab->v + entry * d * (bf16 ? 2 : 4);
                c->bias[key] = slab->log_size[entry] * LOG2E;
                c->pos[key] = slab->pos[entry];
                newest = (int32_t)most(newest, slab->pos[entry]);
            } else if (key - c->past < a->n) {
                k[i] = a->k + (c->head * a->n + key - c->past) * d;
                v[i] = a->v + (c->head * a->n + key - c->past) * d;
                newest = (int32_t)(past->seen + key - c->past);
            }
        }
        for (int half = 0; half < 2; half++)
            FN(mm_pack_rows)(bf16 ? BF16 : F32, k + 16 * half, d, c->keys + (lo + 16 * half) * c->d_k);
        FN(mm_pack_columns)(bf16, v, 32, d, c->values + PANEL * lo, PANEL * c->total);
    }
    c->newest[block] = newest;
}

/* Logits of the query at new position i and the keys lo .. lo + n - 1: the bias of stored keys, -inf for those it cannot see. */
static void mask(const Attention *c, float *s, int64_t i, int64_t lo, int64_t n)
{
    const int64_t window = c->a->window, old = most(0, least(n, c->past - lo)), new_key = lo - c->past;
    for (int64_t j = 0; j < old; j++)
        s[j] += c->bias[lo + j];
    for (int64_t j = most(old, i + 1 - new_key); j < n; j++)
        s[j] = -INFINITY;
    if (window) {
        int64_t hidden = c->a->past.seen + i - window; /* the newest position out of sight */
        for (int64_t j = 0; j < old; j++)
            if (c->pos[lo + j] <= hidden)
                s[j] = -INFINITY;
        for (int64_t j = old; j < least(n, i - window - new_key + 1); j++)
            s[j] = -INFINITY;
    }
}

static void queries(void *context, int64_t task, int thread)
{
    const Attention *c = context;
    const PrefillAttention *a = c->a;
    const int64_t d = a->head_dim, group = a->n_heads / a->n_kv_heads;
    const int64_t head = c->head * group + task % group;
    const int64_t lo = (round_up(a->n, QUERIES) / QUERIES - 1 - task / group) * QUERIES, rows = least(QUERIES, a->n - lo);

    mm_t *q = scratch(thread, 2, sizeof(mm_t) * (size_t)(QUERIES * c->d_k));
    float *s = scratch(thread, 3, sizeof(float) * QUERIES * KEYS);
    mm_t *p = scratch(thread, 4, sizeof(mm_t) * QUERIES * KEYS);
    float *out = scratch(thread, 5, sizeof(float) * (size_t)(QUERIES * c->d_v));
    float peak[QUERIES], total[QUERIES];
    memset(q, 0, sizeof(mm_t) * (size_t)(QUERIES * c->d_k));
    memset(p, 0, sizeof(mm_t) * QUERIES * KEYS);
    memset(out, 0, sizeof(float) * (size_t)(QUERIES * c->d_v));
    for (int64_t i = 0; i < rows; i++) {
        mm_row(a->q + (head * a->n + lo + i) * d, d, a->scale * LOG2E, q + i * c->d_k);
        peak[i] = -FLT_MAX, total[i] = 0;
    }
    FN(mm_begin)();
    for (int64_t key = 0; key < c->past + lo + rows; key += KEYS) {
        if (a->window && c->newest[key / KEYS] <= a->past.seen + lo - a->window)
            continue;
        const int64_t n = least(KEYS, round_up(c->past + lo + rows - key, 32));
        FN(mm)(q, c->d_k, c->keys + key * c->d_k, PANEL * c->d_k, s, KEYS, rows, n / PANEL, c->d_k, 0);
        const int whole = key >= c->past && key + n - c->past <= lo + 1 && !a->window; /* every query sees every key */
        for (int64_t i = 0; i < rows; i++) {
            float *row = s + i * KEYS;
            if (!whole)
                mask(c, row, lo + i, key, n);
            vf high[2] = {load(row), load(row + VW)};
            for (int64_t j = 2 * VW; j < n; j += 2 * VW)
                for (int h = 0; h < 2; h++)
                    high[h] = vmax(high[h], load(row + j + h * VW));
            float new_peak = fmaxf(peak[i], largest(vmax(high[0], high[1])));
            vf sums[2] = {splat(0), splat(0)}, top = splat(new_peak);
            for (int64_t j = 0; j < n; j += 2 * VW)
                for (int h = 0; h < 2; h++) {
                    vf e = exp2v(load(row + j + h * VW) - top);
                    sums[h] += e;
#if MM_PAIR == 2
                    store_bf16(p + i * KEYS + j + h * VW, e);
#else
                    store(p + i * KEYS + j + h * VW, e);
#endif
                }
            if (new_peak > peak[i]) {
                float shrink = exp2f(peak[i] - new_peak);
                total[i] *= shrink;
                for (int64_t j = 0; j < c->d_v; j += VW)
                    store(out + i * c->d_v + j, load(out + i * c->d_v + j) * splat(shrink));
                peak[i] = new_peak;
            }
            total[i] += sum(sums[0] + sums[1]);
        }
        FN(mm)(p, KEYS, c->values + PANEL * key, PANEL * c->total, out, c->d_v, rows, c->d_v / PANEL, n, 1);
    }
    FN(mm_end)();
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < d; j++)
            a->out[((lo + i) * a->n_heads + head) * d + j] = out[i * c->d_v + j] / total[i];
}

void FN(prefill_attention)(const PrefillAttention *a)
{
    Attention c = {.a = a, .d_k = round_up(a->head_dim, MM_K), .d_v = round_up(a->head_dim, PANEL)};
    const int64_t group = a->n_heads / a->n_kv_heads;
    for (c.head = 0; c.head < a->n_kv_heads; c.head++) {
        c.past = round_up(a->past.lengths[c.head], 32);
        c.total = round_up(c.past + a->n, KEYS);
        c.keys = scratch(SHARED, 2, sizeof(mm_t) * (size_t)(c.total * c.d_k));
        c.values = scratch(SHARED, 3, sizeof(mm_t) * (size_t)(c.total * c.d_v));
        c.bias = scratch(SHARED, 4, 4 * (size_t)(2 * c.past + c.total / KEYS));
        c.pos = (int32_t *)(c.bias + c.past);
        c.newest = c.pos + c.past;
        parallel(c.total / KEYS, pack, &c);
        parallel(round_up(a->n, QUERIES) / QUERIES * group, queries, &c);
    }
}
