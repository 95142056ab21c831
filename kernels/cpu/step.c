/* The forward pass over prepared tables: one call a token for decoding, two calls a layer for reading a prompt. What it computes
 * is minillm.model.Model._decode and ._extend. */
#include "minillm_cpu.h"

#include <math.h>
#include <string.h>

enum { MLP_ROWS = 1024 }; /* rows of the wide middle of the MLP that exist at a time */

static int all_finite(const float *x, int64_t n)
{
    float zero = 0;
    for (int64_t i = 0; i < n; i++)
        zero += x[i] * 0.0f; /* NaN from then on, if one is not finite */
    return zero == 0.0f;
}

/* x (n, dim) += mlp(norm(x)). */
static void mlp(const Model *m, const Block *block, float *x, int64_t n)
{
    float *h = scratch(SHARED, 5, sizeof(float) * (size_t)(least(n, MLP_ROWS) * (m->dim + 2 * (int64_t)m->ffn_dim)));
    for (int64_t lo = 0; lo < n; lo += MLP_ROWS) {
        const int64_t rows = least(MLP_ROWS, n - lo);
        float *gate = h + rows * m->dim, *up = gate + rows * m->ffn_dim, *part = x + lo * m->dim;
        kernels->rms_norm(part, block->mlp_norm, m->eps, h, rows, m->dim);
        const Product wide[2] = {{block->w_gate, block->b_gate, gate, m->ffn_dim, 0}, {block->w_up, block->b_up, up, m->ffn_dim, 0}};
        kernels->linear(wide, 2, h, rows);
        kernels->swiglu(gate, up, rows * m->ffn_dim);
        const Product down = {block->w_down, block->b_down, part, m->dim, 1};
        kernels->linear(&down, 1, gate, rows);
    }
}

typedef struct {
    const float *y;
    float *heads;
    int64_t n, n_heads, head_dim;
} Split;

static void split_head(void *context, int64_t i, int thread)
{
    (void)thread;
    const Split *c = context;
    for (int64_t row = 0; row < c->n; row++)
        memcpy(c->heads + (i * c->n + row) * c->head_dim, c->y + (row * c->n_heads + i) * c->head_dim, sizeof(float) * (size_t)c->head_dim);
}

/* The first half of a layer: x (n, dim) -> q (Hq, n, d), or NULL if nobody wants it, k, v (H, n, d), q and k rotated, and mixed
 * (n, Hq d), the attention's output before W_O. cos, sin (n, d / 2). */
EXPORT void minillm_layer_attention(const Model *m, int layer, const float *x, int64_t n, const float *cos, const float *sin, const Paged *past,
                                    float *q, float *k, float *v, float *mixed)
{
    const Block *block = &m->blocks[layer];
    const int64_t d = m->head_dim, q_dim = m->n_heads * d, kv_dim = m->n_kv_heads * d;
    float *h = scratch(SHARED, 5, sizeof(float) * (size_t)(n * (m->dim + q_dim + 2 * kv_dim)));
    float *qkv = h + n * m->dim;
    if (!q)
        q = scratch(SHARED, 6, sizeof(float) * (size_t)(n * q_dim));
    kernels->rms_norm(x, block->attention_norm, m->eps, h, n, m->dim);
    const Product products[3] = {
        {block->wq, block->bq, qkv, q_dim, 0},
        {block->wk, block->bk, qkv + n * q_dim, kv_dim, 0},
        {block->wv, block->bv, qkv + n * (q_dim + kv_dim), kv_dim, 0},
    };
    kernels->linear(products, 3, h, n);
    Split split = {products[0].y, q, n, m->n_heads, d};
    parallel(m->n_heads, split_head, &split);
    split = (Split){products[1].y, k, n, m->n_kv_heads, d};
    parallel(m->n_kv_heads, split_head, &split);
    split = (Split){products[2].y, v, n, m->n_kv_heads, d};
    parallel(m->n_kv_heads, split_head, &split);
    kernels->rope(q, cos, sin, q, m->n_heads, n, d);
    kernels->rope(k, cos, sin, k, m->n_kv_heads, n, d);
    const PrefillAttention a = {q, k, v, mixed, *past, (int32_t)n, m->n_heads, m->n_kv_heads, m->head_dim, m->window, 0, m->scale};
    kernels->prefill_attention(&a);
}

/* The second half: x += W_O mixed, x += mlp(norm(x)). Returns whether x is finite. */
EXPORT int minillm_layer_output(const Model *m, int layer, float *x, int64_t n, const float *mixed)
{
    const Block *block = &m->blocks[layer];
    const Product product = {block->wo, block->bo, x, m->dim, 1};
    kernels->linear(&product, 1, mixed, n);
    mlp(m, block, x, n);
    return all_finite(x, n * m->dim);
}

/* logits (n, vocab) of hidden states (n, dim) before the last norm. */
EXPORT void minillm_logits(const Model *m, const float *x, int64_t n, float *logits)
{
    float *h = scratch(SHARED, 5, sizeof(float) * (size_t)(n * m->dim));
    kernels->rms_norm(x, m->norm, m->eps, h, n, m->dim);
    const Product product = {m->head, NULL, logits, m->vocab_size, 0};
    kernels->linear(&product, 1, h, n);
}

/* k, v (d,) into the last entry of a head; its page is this sequence's own. */
static void append(const Paged *past, int64_t head, int64_t d, const float *k, const float *v)
{
    const int64_t last = past->lengths[head] - 1, page = past->pages[head * past->capacity + last / past->page_size];
    const Slab *slab = &past->slabs[page / past->slab_pages];
    const int64_t entry = page % past->slab_pages * past->page_size + last % past->page_size;
    if (past->bf16) {
        kernels->bf16_from(k, d, (uint16_t *)slab->k + entry * d);
        kernels->bf16_from(v, d, (uint16_t *)slab->v + entry * d);
    } else {
        memcpy((float *)slab->k + entry * d, k, sizeof(float) * (size_t)d);
        memcpy((float *)slab->v + entry * d, v, sizeof(float) * (size_t)d);
    }
    slab->log_size[entry] = 0;
    slab->pos[entry] = (int32_t)past->seen;
}

/* One token of each of B sequences: ids (B,), cos and sin (B, d / 2) -> logits (B, vocab). caches (B,): pages (L, H, capacity)
 * and lengths (L, H) of all layers; the last entry of every head is the new token's, and is written here. queries: NULL, or
 * (L, B, Hq, d) that gets the rotated queries. Returns the first layer whose output is not finite, or -1. */
EXPORT int minillm_decode(const Model *m, const int64_t *ids, int64_t batch, const float *cos, const float *sin, const Paged *caches, float *logits,
                          float *queries)
{
    const int64_t d = m->head_dim, q_dim = m->n_heads * d, kv_dim = m->n_kv_heads * d;
    float *x = scratch(SHARED, 6, sizeof(float) * (size_t)(batch * (2 * m->dim + 2 * q_dim + 2 * kv_dim)) + sizeof(Paged) * (size_t)batch + 64);
    float *h = x + batch * m->dim, *q = h + batch * m->dim, *k = q + batch * q_dim, *v = k + batch * kv_dim, *mixed = v + batch * kv_dim;
    Paged *past = (Paged *)round_up((int64_t)(intptr_t)(mixed + batch * q_dim), 64);
    kernels->rows(&m->embedding, ids, batch, x);
    for (int layer = 0; layer < m->n_layers; layer++) {
        const Block *block = &m->blocks[layer];
        kernels->rms_norm(x, block->attention_norm, m->eps, h, batch, m->dim);
        const Product products[3] = {{block->wq, block->bq, q, q_dim, 0}, {block->wk, block->bk, k, kv_dim, 0}, {block->wv, block->bv, v, kv_dim, 0}};
        kernels->linear(products, 3, h, batch);
        for (int64_t b = 0; b < batch; b++) {
            past[b] = caches[b];
            past[b].pages += (int64_t)layer * m->n_kv_heads * past[b].capacity;
            past[b].lengths += (int64_t)layer * m->n_kv_heads;
            const float *c = cos + b * d / 2, *s = sin + b * d / 2;
            for (int64_t head = 0; head < m->n_heads; head++)
                kernels->rope(q + b * q_dim + head * d, c, s, q + b * q_dim + head * d, 1, 1, d);
            for (int64_t head = 0; head < m->n_kv_heads; head++) {
                float *key = k + b * kv_dim + head * d;
                kernels->rope(key, c, s, key, 1, 1, d);
                append(&past[b], head, d, key, v + b * kv_dim + head * d);
            }
        }
        if (queries)
            memcpy(queries + layer * batch * q_dim, q, sizeof(float) * (size_t)(batch * q_dim));
        const DecodeAttention a = {q, mixed, past, (int32_t)batch, m->n_heads, m->n_kv_heads, m->head_dim, m->window, 0, m->scale};
        kernels->decode_attention(&a);
        const Product product = {block->wo, block->bo, x, m->dim, 1};
        kernels->linear(&product, 1, mixed, batch);
        mlp(m, block, x, batch);
        if (!all_finite(x, batch * m->dim))
            return layer;
    }
    minillm_logits(m, x, batch, logits);
    return -1;
}
