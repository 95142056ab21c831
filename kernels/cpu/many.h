/* What linear.c, many.c and mlp.c share: products of many rows over the left operand of mm.h, and where a product's result goes. */
#ifndef MINILLM_MANY_H
#define MINILLM_MANY_H

#include "minillm_cpu.h"
#include "mm.h"

enum { UNIT = 2 * PANEL, MAX_PRODUCTS = 4 }; /* UNIT: rows of W that a task takes at least */

/* Whether the weights of all are blocks. */
int FN(all_blocks)(const Product *products, int count);

/* Whether `n` rows are few for these products. */
int FN(few)(const Product *products, int count, int64_t n);

/* x (n, width), or rms_norm(x) * norm, as a left operand; it lives until the next call. */
const mm_t *FN(left_operand)(const float *x, int64_t n, int64_t width, const float *norm, float eps);

/* The products of a left operand of n rows. */
void FN(linear_many)(const Product *products, int count, const mm_t *a, int64_t n);

/* act(w_gate a) * (w_up a) as the left operand h. */
void FN(gated_many)(const Block *block, const mm_t *a, int64_t n, mm_t *h);

void FN(rms_norm)(const float *x, const float *weight, float eps, float *y, int64_t n, int64_t dim);
void FN(linear)(const Product *products, int count, const float *x, int64_t n, const float *norm, float eps);

/* The product that owns a unit, and the unit's number in it. end: units of the products up to each one. */
INLINE const Product *product_of(const Product *products, const int64_t *end, int64_t unit, int64_t *local)
{
    int i = 0;
    while (unit >= end[i])
        i++;
    *local = unit - (i ? end[i - 1] : 0);
    return &products[i];
}

/* Where row `row` of n has its columns from `column` on, and how far apart rows are: the columns up to the next head's. */
INLINE float *place(const Product *product, int64_t n, int64_t row, int64_t column, int64_t *stride)
{
    if (!product->head_dim) {
        *stride = product->w.n_out;
        return product->y + row * product->w.n_out + column;
    }
    *stride = product->head_dim;
    return product->y + (column / product->head_dim * n + row) * product->head_dim + column % product->head_dim;
}

/* rows x columns of `source` into y, as the product says. */
INLINE void put(const Product *product, int64_t n, int64_t row, int64_t column, const float *source, int64_t source_stride, int64_t rows, int64_t columns)
{
    for (int64_t end = column + columns, width; column < end; column += width, source += width) {
        width = product->head_dim ? least(end - column, product->head_dim - column % product->head_dim) : end - column;
        int64_t stride;
        float *y = place(product, n, row, column, &stride);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < width; i++)
                y[r * stride + i] = (product->add ? y[r * stride + i] : 0) + (product->bias ? product->bias[column + i] : 0) + source[r * source_stride + i];
    }
}

#endif
