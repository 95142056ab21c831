/* The products of many_blocks.h. A thread spreads the quants of two panels (32 rows of W) over 16 bits, which stay in its caches, and
 * multiplies them with blocks of rows of x: 32 columns in integers, exactly, and then once in float32 with the scales of both. */
#include "many_blocks.h"

#if MANY_BLOCKS

#define NV (PANEL / VW) /* vectors of a panel's row */
#if defined(__AVX512F__)
enum { MR = 8, NP = 2 }; /* rows and panels at a time: 16 of 32 registers are sums */
#else
enum { MR = 4, NP = 1 }; /* 8 of 16 */
#endif
enum { ROWS = 8 /* of x, up to a multiple of which they exist */, LEFT_ROWS = 32 /* a task */ };

typedef struct {
    const float *x, *norm;
    int64_t n;
    float eps;
    Integers a;
} Left;

typedef struct {
    const Product *products;
    int64_t n, n_units, rows_a_task;
    int64_t end[MAX_PRODUCTS]; /* units of the products up to this one */
    const Block *block;        /* of blocks_gated */
    Integers a, h;             /* h: the result */
} Many;

static Integers integers(int slot, int64_t n, int64_t k)
{
    const int64_t rows = round_up(n, ROWS), n_blocks = k / BLOCK;
    Integers a = {.k = k};
    a.d = scratch(SHARED, slot, (size_t)(rows * (8 * n_blocks + 2 * k)));
    a.sum = a.d + rows * n_blocks;
    a.q = (int16_t *)(a.sum + rows * n_blocks);
    return a;
}

/* Block `block` of row `row` from x (BLOCK,); NULL is zeros. */
INLINE void quantise(const Integers *a, int64_t row, int64_t block, const float *x)
{
    typedef int16_t vs __attribute__((vector_size(2 * VW)));
    const int64_t at = row * (a->k / BLOCK) + block;
    int16_t *q = a->q + at * BLOCK;
    vf peak = splat(0), bad = splat(0); /* bad becomes NaN where x is not finite, which a maximum may lose */
    for (int i = 0; x && i < BLOCK; i += VW) {
        peak = vmax(peak, (vf)((vi)load(x + i) & (vi)splat_u(0x7fffffff)));
        bad += load(x + i) * splat(0);
    }
    const float most_ = largest(peak), inverse = most_ > 1e-30f ? 32767.0f / most_ : 0;
    a->d[at] = most_ / 32767.0f + sum(bad);
    if (!x || a->d[at] != a->d[at]) { /* zeros times NaN: what comes of it is NaN, and found */
        memset(q, 0, sizeof(int16_t) * BLOCK);
        a->sum[at] = 0;
        return;
    }
    vf sums = splat(0);
    for (int i = 0; i < BLOCK; i += VW) {
        /* 1.5 * 2^23 added: the low bits of the float are the nearest integer */
        const vi near = (vi)(load(x + i) * splat(inverse) + splat(12582912.0f)) - (vi)splat(12582912.0f);
        const vs words = __builtin_convertvector(near, vs);
        memcpy(q + i, &words, sizeof words);
        sums += __builtin_convertvector(near, vf);
    }
    a->sum[at] = a->d[at] * sum(sums);
}

static void left_rows(void *context, int64_t task, int thread)
{
    const Left *c = context;
    const int64_t k = c->a.k;
    float *normed = c->norm ? scratch(thread, 1, sizeof(float) * (size_t)k) : NULL;
    for (int64_t row = LEFT_ROWS * task; row < least(LEFT_ROWS * (task + 1), round_up(c->n, ROWS)); row++) {
        const float *x = row < c->n ? c->x + row * k : NULL;
        if (x && c->norm) {
            FN(rms_norm)(x, c->norm, c->eps, normed, 1, k);
            x = normed;
        }
        for (int64_t block = 0; block < k / BLOCK; block++)
            quantise(&c->a, row, block, x ? x + block * BLOCK : NULL);
    }
}

Integers FN(left_integers)(const float *x, int64_t n, int64_t width, const float *norm, float eps)
{
    Left c = {x, norm, n, eps, integers(1, n, width)};
    parallel((n + LEFT_ROWS - 1) / LEFT_ROWS, left_rows, &c);
    return c.a;
}

/* A panel spread out: quants [k / 2][16 rows][2] int16, then a scale for every part of a block, [.][16], and offsets [k / 32][16],
 * float32. */
INLINE int64_t spread_bytes(int64_t k) { return PANEL * (2 * k + 4 * (k / 16 + k / BLOCK)); }
INLINE float *spread_scales(int16_t *panel, int64_t k) { return (float *)(panel + k * PANEL); }

/* Two 16-bit numbers a word: byte 0 and 1 of each, less shift. */
INLINE void put_pairs(int16_t *to, vu word, int shift)
{
    const vu low = (word & splat_u(255)) | (word << 8 & splat_u(255 << 16)), less = splat_u((uint32_t)shift << 16 | (uint32_t)shift);
#if defined(__AVX512F__)
    const vu pair = (vu)_mm512_sub_epi16((__m512i)low, (__m512i)less);
#else
    const vu pair = (vu)_mm256_sub_epi16((__m256i)low, (__m256i)less);
#endif
    memcpy(to, &pair, sizeof pair);
}

INLINE void spread(const int kind, const uint8_t *source, int64_t k, int16_t *panel)
{
    float *scales = spread_scales(panel, k), *offsets = scales + k / FACTS[kind].columns * PANEL;
    for (int64_t b = 0; b < k / BLOCK; b++) {
        const PanelBlock block = panel_block(kind, source, k, b);
        UNROLLED
        for (int row = 0; row < PANEL; row += VW) {
            UNROLLED
            for (int g = 0; g < BLOCK / 4; g++) {
                const vu word = quad(kind, &block, row, g);
                int16_t *pairs = panel + PANEL * (BLOCK * b + 4 * g) + 2 * row; /* of columns 4 g and the next; then 4 g + 2 */
                put_pairs(pairs, word, FACTS[kind].shift);
                put_pairs(pairs + 2 * PANEL, word >> 16, FACTS[kind].shift);
            }
            for (int part = 0; part < parts(kind); part++)
                store(scales + PANEL * (b * parts(kind) + part) + row, scale_of(kind, &block, row, part));
            if (FACTS[kind].offsets)
                store(offsets + PANEL * b + row, offset_of(kind, &block, row));
        }
    }
}

INLINE vi dot(vi sums, vi a, vi b)
{
#if defined(__AVX512F__)
    return (vi)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#else
    return (vi)_mm256_add_epi32((__m256i)sums, _mm256_madd_epi16((__m256i)a, (__m256i)b));
#endif
}

/* out (MR, UNIT) = rows of a from `row` on, times NP panels, of whose weights `columns` share a scale. */
INLINE void rows_by_panels(const Integers *a, int64_t row, int16_t *b, float *out, const int columns, const int with_offsets)
{
    const int64_t k = a->k, n_blocks = k / BLOCK, ldb = spread_bytes(k) / 2;
    const int16_t *q = a->q + row * k;
    const float *d = a->d + row * n_blocks, *sum_of = a->sum + row * n_blocks, *scales[NP];
    for (int p = 0; p < NP; p++)
        scales[p] = spread_scales(b + p * ldb, k);
    UNROLLED
    for (int r = 0; r < MR; r++)
        UNROLLED
        for (int v = 0; v < NP * NV; v++)
            store(out + r * UNIT + v * VW, splat(0));
    for (int64_t part = 0; part < k / columns; part++) {
        const int64_t block = part * columns / BLOCK;
        vi sums[MR][NP * NV];
        UNROLLED
        for (int r = 0; r < MR; r++)
            UNROLLED
            for (int v = 0; v < NP * NV; v++)
                sums[r][v] = (vi)splat_u(0);
        for (int64_t i = columns * part; i < columns * (part + 1); i += 2) {
            vi column[NP * NV];
            UNROLLED
            for (int v = 0; v < NP * NV; v++)
                column[v] = load_i(b + v / NV * ldb + PANEL * i + v % NV * VW * 2);
            UNROLLED
            for (int r = 0; r < MR; r++) {
                uint32_t pair;
                memcpy(&pair, q + r * k + i, 4);
                UNROLLED
                for (int v = 0; v < NP * NV; v++)
                    sums[r][v] = dot(sums[r][v], column[v], (vi)splat_u(pair));
            }
        }
        UNROLLED
        for (int v = 0; v < NP * NV; v++) {
            const float *at = scales[v / NV] + PANEL * part + v % NV * VW;
            const vf scale = load(at), offset = with_offsets ? load(at + PANEL * (k / columns)) : splat(0);
            UNROLLED
            for (int r = 0; r < MR; r++) {
                float *to = out + r * UNIT + v * VW;
                vf grown = load(to) + __builtin_convertvector(sums[r][v], vf) * (scale * splat(d[r * n_blocks + block]));
                if (with_offsets)
                    grown += offset * splat(sum_of[r * n_blocks + block]);
                store(to, grown);
            }
        }
    }
}

/* out (32, UNIT) = up to 32 rows of a, from `row` on, times two panels of this kind. */
static void product(const Integers *a, int64_t row, int64_t rows, int kind, int16_t *b, float *out)
{
    for (int64_t r = 0; r < rows; r += MR)
        for (int p = 0; p < 2; p += NP) {
            int16_t *panel = b + p * spread_bytes(a->k) / 2;
            float *to = out + r * UNIT + p * PANEL;
            if (FACTS[kind].offsets)
                rows_by_panels(a, row + r, panel, to, BLOCK, 1);
            else if (FACTS[kind].columns == BLOCK)
                rows_by_panels(a, row + r, panel, to, BLOCK, 0);
            else
                rows_by_panels(a, row + r, panel, to, BLOCK / 2, 0);
        }
}

static void spread_panel(const Matrix *w, int64_t p, int16_t *panel)
{
#define CASE(kind) case kind: spread(kind, panel_of(w, p), w->n_in, panel); return;
    switch (w->kind) {
    FOR_BLOCK_KINDS(CASE)
    }
#undef CASE
}

/* Panels 2 unit and the next one of w; zeros beyond its last. */
static void spread_unit(const Matrix *w, int64_t unit, int16_t *b)
{
    for (int64_t p = 0; p < 2; p++)
        if (PANEL * (2 * unit + p) < w->n_out)
            spread_panel(w, 2 * unit + p, b + p * spread_bytes(w->n_in) / 2);
        else
            memset(b + p * spread_bytes(w->n_in) / 2, 0, (size_t)spread_bytes(w->n_in));
}

/* A block of rows of x that stays in the L2 cache (1 MiB of it), but enough of them to pay for the spreading. */
static int64_t rows_a_task(int64_t k) { return most(256, round_up((1 << 19) / k, 32)); }

static void many_rows(void *context, int64_t task, int thread)
{
    const Many *c = context;
    const int64_t lo = task / c->n_units * c->rows_a_task, hi = least(lo + c->rows_a_task, c->n);
    int64_t local;
    const Product *y = product_of(c->products, c->end, task % c->n_units, &local);
    int16_t *b = scratch(thread, 0, (size_t)(2 * spread_bytes(c->a.k)));
    spread_unit(&y->w, local, b);
    for (int64_t row = lo; row < hi; row += 32) {
        float block[32 * UNIT] __attribute__((aligned(64)));
        const int64_t rows = least(32, hi - row);
        product(&c->a, row, rows, y->w.kind, b, block);
        put(y, c->n, row, UNIT * local, block, UNIT, rows, least(UNIT, y->w.n_out - UNIT * local));
    }
}

void FN(blocks_many)(const Product *products, int count, Integers a, int64_t n)
{
    Many c = {.products = products, .n = n, .rows_a_task = rows_a_task(a.k), .a = a};
    for (int i = 0; i < count; i++) {
        c.n_units += round_up(products[i].w.n_out, UNIT) / UNIT;
        c.end[i] = c.n_units;
    }
    parallel(c.n_units * ((n + c.rows_a_task - 1) / c.rows_a_task), many_rows, &c);
}

static void gated(void *context, int64_t task, int thread)
{
    const Many *c = context;
    const int64_t unit = task % c->n_units, lo = task / c->n_units * c->rows_a_task, hi = least(lo + c->rows_a_task, c->n);
    int16_t *b[2];
    b[0] = scratch(thread, 0, (size_t)(4 * spread_bytes(c->a.k)));
    b[1] = b[0] + spread_bytes(c->a.k);
    for (int p = 0; p < 2; p++)
        spread_unit(&c->products[p].w, unit, b[p]);
    for (int64_t row = lo; row < hi; row += 32) {
        float block[2][32 * UNIT] __attribute__((aligned(64)));
        const int64_t rows = least(32, round_up(hi - row, ROWS));
        for (int p = 0; p < 2; p++)
            product(&c->a, row, rows, c->products[p].w.kind, b[p], block[p]);
        for (int64_t r = 0; r < rows; r++) {
            float *gate = block[0] + r * UNIT, *up = block[1] + r * UNIT;
            for (int i = 0; i < UNIT; i += VW) {
                vf g = load(gate + i), u = load(up + i);
                if (c->products[0].bias)
                    g += load(c->products[0].bias + UNIT * unit + i);
                if (c->products[1].bias)
                    u += load(c->products[1].bias + UNIT * unit + i);
                store(gate + i, activated(g, c->block->linear, c->block->cubic) * u);
            }
            quantise(&c->h, row + r, unit, gate);
        }
    }
}

Integers FN(blocks_gated)(const Block *block, Integers a, int64_t n)
{
    const Product products[2] = {{block->w_gate, block->b_gate, NULL, 0, 0}, {block->w_up, block->b_up, NULL, 0, 0}};
    Many c = {.products = products, .block = block, .n = n, .rows_a_task = rows_a_task(a.k), .a = a};
    c.h = integers(7, n, block->w_gate.n_out);
    c.n_units = block->w_gate.n_out / UNIT;
    parallel(c.n_units * ((n + c.rows_a_task - 1) / c.rows_a_task), gated, &c);
    return c.h;
}

#endif
