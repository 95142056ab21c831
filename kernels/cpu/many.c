/* Products of many rows. A thread widens two panels (32 rows of W) to the operand of mm.h, which stays in its L2 cache, and multiplies
 * them with a block of rows of x. On avx512 and amx the operands are bf16, the sums float32.
 * Without AMX, weights in blocks go another way: many_blocks.c.
 *
 * gate and up are one product: a task takes 16 rows of each, and act(gate) * up leaves the L1 cache once, as the operand of w_down.
 * Written out in float32 in between, it cost 20 bytes of memory traffic an element instead of 2. */
#include "many.h"
#include "panels.h"

typedef struct {
    const Product *products;
    const mm_t *a;
    int64_t n, k, n_units, rows_a_task;
    int64_t end[MAX_PRODUCTS]; /* units of the products up to this one */
    const Block *block;        /* of gated_many */
    mm_t *h;                   /* the result, h_k wide */
    int64_t h_k;
} Many;

typedef struct {
    const float *x, *norm;
    int64_t n, width;
    float eps;
    mm_t *a;
} Left;

enum { LEFT_ROWS = 32 }; /* a task */

static void left_rows(void *context, int64_t task, int thread)
{
    const Left *c = context;
    float *normed = c->norm ? scratch(thread, 1, sizeof(float) * (size_t)c->width) : NULL;
    for (int64_t row = LEFT_ROWS * task; row < least(LEFT_ROWS * (task + 1), c->n); row++) {
        const float *x = c->x + row * c->width;
        if (c->norm)
            FN(rms_norm)(x, c->norm, c->eps, normed, 1, c->width);
        FN(mm_left_row)(F32, c->norm ? normed : x, c->width, c->a, round_up(c->width, MM_K), row);
    }
}

const mm_t *FN(left_operand)(const float *x, int64_t n, int64_t width, const float *norm, float eps)
{
    mm_t *a = scratch(SHARED, 1, sizeof(mm_t) * (size_t)(round_up(n, 32) * round_up(width, MM_K)));
    Left c = {x, norm, n, width, eps, a};
    parallel(round_up(n, LEFT_ROWS) / LEFT_ROWS, left_rows, &c);
    return a;
}

/* A block of rows of x that stays in the L2 cache (1 MiB of it), but enough of them to pay for the widening. */
static int64_t rows_a_task(int64_t k) { return most(256, round_up((1 << 20) / (k * (int64_t)sizeof(mm_t)), 32)); }

static void many_rows(void *context, int64_t task, int thread)
{
    const Many *c = context;
    const int64_t k = c->k, ldb = PANEL * k;
    int64_t local, unit = task % c->n_units, lo = task / c->n_units * c->rows_a_task, hi = least(lo + c->rows_a_task, c->n);
    const Product *product = product_of(c->products, c->end, unit, &local);
    const Matrix *w = &product->w;
    const int64_t column = UNIT * local, columns = least(UNIT, w->n_out - column), panels = columns > PANEL ? 2 : 1;
    mm_t *b = scratch(thread, 0, sizeof(mm_t) * (size_t)(2 * ldb));
    for (int64_t p = 0; p < panels; p++)
        FN(mm_pack_weight)(w, column / PANEL + p, b + p * ldb);
    FN(mm_begin)();
    int straight = columns % PANEL == 0 && product->head_dim % UNIT == 0; /* whole panels, in one head */
    int64_t whole = straight ? (hi - lo) / 32 * 32 : 0;                   /* rows that go straight to y */
    if (whole) {
        int64_t stride;
        float *y = place(product, c->n, lo, column, &stride);
        FN(mm)(c->a + lo * k, k, b, ldb, y, stride, whole, panels, k, product->add != 0);
        if (product->bias)
            for (int64_t r = 0; r < whole; r++)
                for (int64_t i = 0; i < columns; i++)
                    y[r * stride + i] += product->bias[column + i];
    }
    for (int64_t row = lo + whole; row < hi; row += 32) {
        float block[32 * UNIT] __attribute__((aligned(64)));
        FN(mm)(c->a + row * k, k, b, ldb, block, UNIT, least(32, hi - row), panels, k, 0);
        put(product, c->n, row, column, block, UNIT, least(32, hi - row), columns);
    }
    FN(mm_end)();
}

void FN(linear_many)(const Product *products, int count, const mm_t *a, int64_t n)
{
    Many c = {.products = products, .a = a, .n = n, .k = round_up(products[0].w.n_in, MM_K)};
    for (int i = 0; i < count; i++) {
        c.n_units += round_up(products[i].w.n_out, UNIT) / UNIT;
        c.end[i] = c.n_units;
    }
    c.rows_a_task = rows_a_task(c.k);
    parallel(c.n_units * ((n + c.rows_a_task - 1) / c.rows_a_task), many_rows, &c);
}

static void gated(void *context, int64_t task, int thread)
{
    const Many *c = context;
    const int64_t k = c->k, ldb = PANEL * k, unit = task % c->n_units, column = PANEL * unit;
    const int64_t lo = task / c->n_units * c->rows_a_task, hi = least(lo + c->rows_a_task, c->n);
    mm_t *b = scratch(thread, 0, sizeof(mm_t) * (size_t)(2 * ldb));
    float bias[2][PANEL] = {{0}};
    if (column >= c->products[0].w.n_out) /* the padding of h */
        memset(b, 0, sizeof(mm_t) * (size_t)(2 * ldb));
    else
        for (int p = 0; p < 2; p++) {
            const Product *product = &c->products[p];
            FN(mm_pack_weight)(&product->w, unit, b + p * ldb);
            for (int64_t i = 0; product->bias && i < least(PANEL, product->w.n_out - column); i++)
                bias[p][i] = product->bias[column + i];
        }
    FN(mm_begin)();
    for (int64_t row = lo; row < hi; row += 32) {
        float block[32 * UNIT] __attribute__((aligned(64)));
        FN(mm)(c->a + row * k, k, b, ldb, block, UNIT, least(32, hi - row), 2, k, 0);
        for (int64_t r = 0; r < least(32, hi - row); r++) {
            mm_t *h = mm_left(c->h, c->h_k, row + r, column / MM_K * MM_K) + column % MM_K, result[PANEL];
            for (int i = 0; i < PANEL; i += VW) {
                vf gate = load(block + r * UNIT + i) + load(bias[0] + i), up = load(block + r * UNIT + PANEL + i) + load(bias[1] + i);
                vf y = activated(gate, c->block->linear, c->block->cubic) * up;
#if MM_PAIR == 2
                store_bf16(result + i, y);
#else
                store(result + i, y);
#endif
            }
            if (c->h_k - column >= PANEL)
                memcpy(h, result, sizeof result);
            else
                memcpy(h, result, sizeof(mm_t) * (size_t)(c->h_k - column));
        }
    }
    FN(mm_end)();
}

void FN(gated_many)(const Block *block, const mm_t *a, int64_t n, mm_t *h)
{
    const Product products[2] = {{block->w_gate, block->b_gate, NULL, 0, 0}, {block->w_up, block->b_up, NULL, 0, 0}};
    Many c = {.products = products, .block = block, .a = a, .n = n, .h = h};
    c.k = round_up(block->w_gate.n_in, MM_K), c.h_k = round_up(block->w_gate.n_out, MM_K);
    c.n_units = round_up(c.h_k, PANEL) / PANEL;
    c.rows_a_task = rows_a_task(c.k);
    parallel(c.n_units * ((n + c.rows_a_task - 1) / c.rows_a_task), gated, &c);
}
