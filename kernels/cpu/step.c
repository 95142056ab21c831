/* The forward pass over prepared tables: one call a token for decoding, two calls a layer for reading a prompt. What it computes
 * is minillm.model.Model._decode, .attention and .output. */
#include "minillm_cpu.h"

#include <string.h>

/* Heads (heads, n, d) of queries or keys, each over its norm where the model has one, turned to n positions. */
static void turn(const Model *m, float *x, const float *norm, int64_t heads, int64_t n, const float *cos, const float *sin)
{
    if (norm)
        kernels->rms_norm(x, norm, m->eps, x, heads * n, m->head_dim);
    kernels->rope(x, cos, sin, x, heads, n, m->head_dim);
}

/* Queries (Hq, n, d) times the temperatures (n,) of their positions, if there are any. */
static void warm(const Model *m, float *q, int64_t n, const float *temperature)
{
    for (int64_t row = 0; temperature && row < m->n_heads * n; row++)
        for (int64_t i = 0; i < m->head_dim; i++)
            q[row * m->head_dim + i] *= temperature[row % n];
}

/* The first half of a layer: x (n, dim) -> q (Hq, n, d), or NULL if nobody wants it, and lse (Hq, n) of its attention, or NULL; k, v
 * (H, n, d), q and k rotated, and mixed (n, Hq d), the attention's output before W_O. score (H, n): what the profile predicts, or NULL.
 * cos, sin (n, d / 2); temperature (n,) or NULL. */
static void layer_attention(const Model *m, int layer, const float *x, int64_t n, const float *cos, const float *sin, const float *temperature,
                            const Paged *past, float *q,
                            float *lse, float *k, float *v, float *score, float *mixed)
{
    const Block *block = &m->blocks[layer];
    const int64_t d = m->head_dim;
    if (!q)
        q = scratch(SHARED, 6, sizeof(float) * (size_t)(n * m->n_heads * d));
    const Product products[4] = {{block->wq, block->bq, q, d, 0},
                                 {block->wk, block->bk, k, d, 0},
                                 {block->wv, block->bv, v, d, 0},
                                 {block->w_score, block->b_score, score, 1, 0}};
    kernels->linear(products, score ? 4 : 3, x, n, block->attention_norm, m->eps);
    turn(m, q, block->q_norm, m->n_heads, n, cos, sin);
    warm(m, q, n, temperature);
    turn(m, k, block->k_norm, m->n_kv_heads, n, cos, sin);
    const PrefillAttention a = {
        q, k, v, mixed, lse, NULL, *past, (int32_t)n, (int32_t)n, m->n_heads, m->n_kv_heads, m->head_dim, block->window, m->scale};
    kernels->prefill_attention(&a);
}

EXPORT void minillm_layer_attention(const Model *m, int layer, const float *x, int64_t n, const float *cos, const float *sin, const float *temperature,
                                    const Paged *past, float *q, float *lse, float *k, float *v, float *score, float *mixed)
{
    ATTEMPT(layer_attention(m, layer, x, n, cos, sin, temperature, past, q, lse, k, v, score, mixed));
}

/* x += W_O mixed, over its norm where the model has one. */
static void attended(const Model *m, const Block *block, float *x, int64_t n, const float *mixed)
{
    const float *norm = block->attention_output_norm;
    float *out = norm ? scratch(SHARED, 5, sizeof(float) * (size_t)(n * m->dim)) : x;
    const Product product = {block->wo, block->bo, out, 0, !norm};
    kernels->linear(&product, 1, mixed, n, NULL, 0);
    if (norm)
        kernels->add_rms_norm(out, norm, m->eps, x, n, m->dim);
}

/* The second half: x += W_O mixed, x += mlp(norm(x)). Returns whether x is finite. */
static int layer_output(const Model *m, int layer, float *x, int64_t n, const float *mixed)
{
    const Block *block = &m->blocks[layer];
    attended(m, block, x, n, mixed);
    kernels->mlp(block, x, n, m->eps);
    return kernels->finite(x, n * m->dim);
}

EXPORT int minillm_layer_output(const Model *m, int layer, float *x, int64_t n, const float *mixed)
{
    int finite = 0;
    ATTEMPT(finite = layer_output(m, layer, x, n, mixed));
    return finite;
}

/* logits (n, vocab) of hidden states (n, dim) before the last norm. */
static void logits_of(const Model *m, const float *x, int64_t n, float *logits)
{
    const Product product = {m->head, NULL, logits, 0, 0};
    kernels->linear(&product, 1, x, n, m->norm, m->eps);
}

EXPORT void minillm_logits(const Model *m, const float *x, int64_t n, float *logits) { ATTEMPT(logits_of(m, x, n, logits)); }

/* k, v (d,) into the last entry of a head; its page is this sequence's own. */
static void append(const Paged *past, int64_t head, int64_t d, const float *k, const float *v)
{
    const Slab *slab;
    const int64_t entry = entry_of(past, head, past->lengths[head] - 1, &slab);
    kernels->store_rows(k, 1, d, past, slab, 0, entry);
    kernels->store_rows(v, 1, d, past, slab, 1, entry);
    slab->log_size[entry] = 0;
    slab->pos[entry] = (int32_t)past->seen;
}

/* One token of each of B sequences: ids (B,), cos and sin (ropes, B, d / 2), temperature (B,) or NULL -> logits (B, vocab). caches (B,): pages (L, H, capacity)
 * and lengths (L, H) of all layers; the last entry of every head is the new token's, and is written here. queries: NULL, or
 * (L, B, Hq, d) that gets the rotated queries; scores: NULL, or (L, B, H) that gets what the profile predicts. Returns the first
 * layer whose output is not finite, L for the logits, or -1. */
static int decode(const Model *m, const int64_t *ids, int64_t batch, const float *cos, const float *sin, const float *temperature,
                  const Paged *caches, float *logits,
                  float *queries, float *scores)
{
    const int64_t d = m->head_dim, q_dim = m->n_heads * d, kv_dim = m->n_kv_heads * d;
    float *x = scratch(SHARED, 6, sizeof(float) * (size_t)(batch * (m->dim + 2 * q_dim + 2 * kv_dim)) + sizeof(Paged) * (size_t)batch + 64);
    float *q = x + batch * m->dim, *k = q + batch * q_dim, *v = k + batch * kv_dim, *mixed = v + batch * kv_dim;
    Paged *past = (Paged *)round_up((int64_t)(intptr_t)(mixed + batch * q_dim), 64);
    kernels->rows(&m->embedding, ids, batch, x);
    for (int64_t i = 0; i < batch * m->dim; i++)
        x[i] *= m->embedding_scale;
    for (int layer = 0; layer < m->n_layers; layer++) {
        const Block *block = &m->blocks[layer];
        const Product products[4] = {{block->wq, block->bq, q, 0, 0},
                                     {block->wk, block->bk, k, 0, 0},
                                     {block->wv, block->bv, v, 0, 0},
                                     {block->w_score, block->b_score, scores + layer * batch * m->n_kv_heads, 0, 0}};
        kernels->linear(products, scores ? 4 : 3, x, batch, block->attention_norm, m->eps);
        for (int64_t b = 0; b < batch; b++) {
            past[b] = caches[b];
            past[b].pages += (int64_t)layer * m->n_kv_heads * past[b].capacity;
            past[b].lengths += (int64_t)layer * m->n_kv_heads;
            const int64_t at = (block->rope * batch + b) * d / 2;
            turn(m, q + b * q_dim, block->q_norm, m->n_heads, 1, cos + at, sin + at);
            warm(m, q + b * q_dim, 1, temperature ? temperature + b : NULL);
            turn(m, k + b * kv_dim, block->k_norm, m->n_kv_heads, 1, cos + at, sin + at);
            for (int64_t head = 0; head < m->n_kv_heads; head++)
                append(&past[b], head, d, k + b * kv_dim + head * d, v + b * kv_dim + head * d);
        }
        if (queries)
            memcpy(queries + layer * batch * q_dim, q, sizeof(float) * (size_t)(batch * q_dim));
        const DecodeAttention a = {q, mixed, past, (int32_t)batch, m->n_heads, m->n_kv_heads, m->head_dim, block->window, 0, m->scale};
        kernels->decode_attention(&a);
        attended(m, block, x, batch, mixed);
        kernels->mlp(block, x, batch, m->eps);
        if (!kernels->finite(x, batch * m->dim))
            return layer;
    }
    logits_of(m, x, batch, logits);
    return kernels->finite(logits, batch * m->vocab_size) ? -1 : m->n_layers;
}

EXPORT int minillm_decode(const Model *m, const int64_t *ids, int64_t batch, const float *cos, const float *sin, const float *temperature,
                  const Paged *caches, float *logits,
                          float *queries, float *scores)
{
    int bad_layer = -1;
    ATTEMPT(bad_layer = decode(m, ids, batch, cos, sin, temperature, caches, logits, queries, scores));
    return bad_layer;
}
