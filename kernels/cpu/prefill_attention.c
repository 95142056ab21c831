/* Causal attention of n queries over stored entries and over m new tokens, mostly their own: softmax(q.k scale + log s) v.
 *
 * One KV head after another: its keys (stored ones, padded to 32, then the new ones) and values are packed as operands of mm.h, then 32
 * queries of one query head are a task: blocks of KEYS keys pass through the caches, the softmax is kept online (Milakov & Gimelshein
 * 2018), in base 2. Everything is transposed, K Q^T and V^T P: a query is a lane of a register, so that maxima and sums need no
 * reduction across one and a block costs each query one register, not a pass over a row. A query's maximum is raised only when a
 * logit exceeds it by SLACK, which it seldom does after the first blocks (the weights are then up to 2^SLACK, and so is their sum).
 * The last queries, which see most, are taken first. */
#include "mm.h"
#include "rows.h"

#include <float.h>

enum { QUERIES = 32, KEYS = 128 };
#define LOG2E 1.44269504f
#define LN2 0.69314718f
#define MASKED -1e30f /* logit of a key that is not seen: finite, so that no difference is NaN */
#define LOWEST -1e29f /* where a maximum begins */
#define SLACK 8.0f

typedef struct {
    const PrefillAttention *a;
    int64_t head, past, total; /* KV head; stored keys padded to 32; with the new ones padded to KEYS */
    int64_t d_k, d_v, v_rows;  /* head_dim padded for the two products, and for the left operand of the second */
    mm_t *keys;                /* (total, d_k) left operand */
    mm_t *values;              /* for each block of keys, its transpose: (d_v, KEYS) left operand, rows padded to MM_ROWS */
    float *bias;               /* (past,) log2 s; MASKED for padding */
    int32_t *pos;              /* (past,) */
    int32_t *newest;           /* (total / KEYS) largest position in a block of keys */
} Attention;

static void pack(void *context, int64_t block, int thread)
{
    const Attention *c = context;
    const PrefillAttention *a = c->a;
    const Paged *past = &a->past;
    const int64_t d = a->head_dim, stored = past->lengths[c->head];
    float *room = scratch(thread, 2, sizeof(float) * (size_t)(2 * 32 * d)); /* rows that mm.h does not take as they are */
    int32_t newest = INT32_MIN;
    for (int64_t lo = block * KEYS; lo < (block + 1) * KEYS; lo += 32) {
        const void *k[32], *v[32];
        const int old = lo < c->past, k_kind = old ? operand_kind(past->keys) : F32, v_kind = old ? operand_kind(past->values) : F32;
        for (int64_t i = 0; i < 32; i++) {
            int64_t key = lo + i;
            k[i] = v[i] = NULL;
            if (old) {
                c->bias[key] = MASKED;
                c->pos[key] = INT32_MIN;
                if (key >= stored)
                    continue;
                const Slab *slab;
                int64_t entry = entry_of(past, c->head, key, &slab);
                k[i] = operand(past->keys, slab, 0, entry, d, room + i * d);
                v[i] = operand(past->values, slab, 1, entry, d, room + (32 + i) * d);
                c->bias[key] = slab->log_size[entry] * LOG2E;
                c->pos[key] = slab->pos[entry];
                newest = (int32_t)most(newest, slab->pos[entry]);
            } else if (key - c->past < a->m) {
                k[i] = a->k + (c->head * a->m + key - c->past) * d;
                v[i] = a->v + (c->head * a->m + key - c->past) * d;
                newest = (int32_t)(past->seen + key - c->past);
            }
        }
        for (int64_t i = 0; i < 32; i++)
            FN(mm_left_row)(k_kind, k[i], k[i] ? d : 0, c->keys, c->d_k, lo + i);
        FN(mm_left_columns)(v_kind, v, d, c->values + block * KEYS * c->v_rows, KEYS, lo % KEYS);
    }
    c->newest[block] = newest;
}

/* The position of query i, or of the last one. */
static int32_t position(const PrefillAttention *a, int64_t i)
{
    i = least(i, a->n - 1);
    return a->q_pos ? a->q_pos[i] : (int32_t)(a->past.seen + i);
}

/* New tokens that query i sees. */
static int64_t visible(const PrefillAttention *a, int64_t i) { return most(0, least(a->m, position(a, i) - a->past.seen + 1)); }

/* Logits s (n, QUERIES) of the keys lo .. lo + n - 1 and the queries first ...: the bias of stored keys, MASKED where a query cannot
 * see a key. */
static void mask(const Attention *c, float *s, int64_t first, int64_t lo, int64_t n)
{
    const int32_t window = c->a->window, seen = (int32_t)c->a->past.seen;
    int32_t positions[QUERIES];
    for (int i = 0; i < QUERIES; i++)
        positions[i] = position(c->a, first + i);
    for (int64_t j = 0; j < n; j++) {
        const int old = lo + j < c->past;
        const int32_t number = (int32_t)(lo + j - c->past), key = old ? c->pos[lo + j] : number < c->a->m ? seen + number : INT32_MAX;
        const vf bias = splat(old ? c->bias[lo + j] : 0);
        for (int i = 0; i < QUERIES; i += VW) {
            const vi query = load_i(positions + i);
            vi hidden = (vi)splat_u(0);
            if (!old)
                hidden |= key > query;
            if (window)
                hidden |= key <= query - window;
            float *at = s + j * QUERIES + i;
            store(at, choose(hidden, splat(MASKED), load(at) + bias));
        }
    }
}

#if MM_PAIR == 2
/* 2^x to 7e-5, which bf16 weights do not tell from more; x far below zero, or -inf, gives 0. */
INLINE vf weight(vf x)
{
    vf f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); /* x - floor(x) */
    vf p = splat(0.22606716f) + f * splat(0.07802452f);
    p = splat(0.69583354f) + f * p;
    p = splat(0.99992522f) + f * p;
    return _mm512_scalef_ps(p, x); /* p 2^floor(x) */
}
#else
INLINE vf weight(vf x) { return exp2v(x); }
#endif

/* VW queries of a block: logits s (n, QUERIES) -> weights p (n, 16) in the order of a panel of mm.h; peak and total (VW,) and the
 * weighted values out (d_v, QUERIES) so far are brought up to date. */
INLINE void soften(const float *s, int64_t n, mm_t *p, float *peak, float *total, float *out, int64_t d_v)
{
    vf high[4] = {splat(MASKED), splat(MASKED), splat(MASKED), splat(MASKED)}, top = load(peak), sum_ = load(total);
    for (int64_t j = 0; j < n; j += 4)
        for (int h = 0; h < 4; h++)
            high[h] = vmax(high[h], load(s + (j + h) * QUERIES));
    vf highest = vmax(vmax(high[0], high[1]), vmax(high[2], high[3]));
    vi raised = highest > top + splat(SLACK);
    if (any(raised)) {
        vf new_top = choose(raised, highest, top), shrink = exp2v(top - new_top);
        for (int64_t j = 0; j < d_v; j++)
            store(out + j * QUERIES, load(out + j * QUERIES) * shrink);
        sum_ *= shrink;
        top = new_top;
        store(peak, top);
    }
#if MM_PAIR == 2
    /* Two keys a word. Cut off, not rounded: the sums are those of what was stored, so that the bias goes. */
    const __m512bh ones = (__m512bh)splat_u(0x3f803f80);
    for (int64_t j = 0; j < n; j += 2) {
        vu even = (vu)weight(load(s + j * QUERIES) - top), odd = (vu)weight(load(s + (j + 1) * QUERIES) - top);
        vu pair = even >> 16 | (odd & splat_u(0xffff0000));
        memcpy(p + PANEL * j, &pair, sizeof pair);
        sum_ = _mm512_dpbf16_ps(sum_, (__m512bh)pair, ones);
    }
#else
    for (int64_t j = 0; j < n; j++) {
        vf e = weight(load(s + j * QUERIES) - top);
        store(p + PANEL * j, e);
        sum_ += e;
    }
#endif
    store(total, sum_);
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
    float *out = scratch(thread, 5, sizeof(float) * (size_t)(QUERIES * (c->d_v + d)));
    float *scaled = out + QUERIES * c->d_v; /* (QUERIES, d) */
    float peak[QUERIES], total[QUERIES];
    const void *scaled_rows[QUERIES] = {NULL};
    for (int64_t i = 0; i < rows; i++) {
        scaled_rows[i] = scaled + i * d;
        for (int64_t j = 0; j < d; j++)
            scaled[i * d + j] = a->q[(head * a->n + lo + i) * d + j] * (a->scale * LOG2E);
    }
    for (int64_t i = 0; i < QUERIES; i += PANEL)
        FN(mm_pack_rows)(F32, scaled_rows + i, d, q + i * c->d_k);
    memset(out, 0, sizeof(float) * (size_t)(QUERIES * c->d_v));
    for (int64_t i = 0; i < QUERIES; i++)
        peak[i] = LOWEST, total[i] = 0;
    FN(mm_begin)();
    const int64_t all_see = c->past + visible(a, lo), end = c->past + visible(a, lo + rows - 1); /* of the keys */
    for (int64_t key = 0; key < end; key += KEYS) {
        if (a->window && c->newest[key / KEYS] <= position(a, lo) - a->window)
            continue;
        const int64_t n = least(KEYS, round_up(end - key, 32));
        FN(mm)(c->keys + key * c->d_k, c->d_k, q, PANEL * c->d_k, s, QUERIES, n, QUERIES / PANEL, c->d_k, 0);
        if (key < c->past || key + n > all_see || a->window) /* not every query sees every key */
            mask(c, s, lo, key, n);
        for (int i = 0; i < QUERIES; i += VW)
            soften(s + i, n, p + i / PANEL * PANEL * KEYS + i % PANEL, peak + i, total + i, out + i, c->d_v);
        FN(mm)(c->values + key * c->v_rows, KEYS, p, PANEL * KEYS, out, QUERIES, c->d_v, QUERIES / PANEL, n, 1);
    }
    FN(mm_end)();
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < d; j++)
            a->out[((lo + i) * a->n_heads + head) * d + j] = total[i] > 0 ? out[j * QUERIES + i] / total[i] : 0;
        if (a->lse)
            a->lse[head * a->n + lo + i] = (peak[i] + log2f(total[i])) * LN2;
    }
}

void FN(prefill_attention)(const PrefillAttention *a)
{
    Attention c = {.a = a, .d_k = round_up(a->head_dim, MM_K), .d_v = round_up(a->head_dim, PANEL)};
    c.v_rows = round_up(c.d_v, MM_ROWS);
    const int64_t group = a->n_heads / a->n_kv_heads;
    for (c.head = 0; c.head < a->n_kv_heads; c.head++) {
        c.past = round_up(a->past.lengths[c.head], 32);
        c.total = round_up(c.past + a->m, KEYS);
        c.keys = scratch(SHARED, 2, sizeof(mm_t) * (size_t)(c.total * c.d_k));
        c.values = scratch(SHARED, 3, sizeof(mm_t) * (size_t)(c.total * c.v_rows));
        c.bias = scratch(SHARED, 4, 4 * (size_t)(2 * c.past + c.total / KEYS));
        c.pos = (int32_t *)(c.bias + c.past);
        c.newest = c.pos + c.past;
        parallel(c.total / KEYS, pack, &c);
        parallel(round_up(a->n, QUERIES) / QUERIES * group, queries, &c);
    }
}
