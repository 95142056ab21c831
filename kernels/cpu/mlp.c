/* x (n, dim) += w_down (act(w_gate h) * (w_up h)), h = rms_norm(x): the second half of a layer, in place. */
#include "many_blocks.h"

enum { ROWS = 1024 }; /* rows of the wide middle that exist at a time */

void FN(glu)(float *, const float *, int64_t, float, float);
void FN(add_rms_norm)(const float *, const float *, float, float *, int64_t, int64_t);

void FN(mlp)(const Block *block, float *x, int64_t n, float eps)
{
    const int64_t dim = block->w_down.n_out, ffn_dim = block->w_down.n_in;
    const float *norm = block->mlp_output_norm;
    for (int64_t lo = 0; lo < n; lo += ROWS) {
        const int64_t rows = least(ROWS, n - lo);
        float *part = x + lo * dim, *out = norm ? scratch(SHARED, 5, sizeof(float) * (size_t)(rows * dim)) : part;
        const Product down = {block->w_down, block->b_down, out, 0, !norm};
        Product wide[2] = {{block->w_gate, block->b_gate, NULL, 0, 0}, {block->w_up, block->b_up, NULL, 0, 0}};
        if (FN(few)(wide, 2, rows) || FN(few)(&down, 1, rows)) {
            float *gate = scratch(SHARED, 7, sizeof(float) * (size_t)(2 * rows * ffn_dim)), *up = gate + rows * ffn_dim;
            wide[0].y = gate, wide[1].y = up;
            FN(linear)(wide, 2, part, rows, block->mlp_norm, eps);
            FN(glu)(gate, up, rows * ffn_dim, block->linear, block->cubic);
            FN(linear)(&down, 1, gate, rows, NULL, 0);
#if MANY_BLOCKS
        } else if (FN(all_blocks)(wide, 2) && FN(all_blocks)(&down, 1)) {
            const Integers h = FN(blocks_gated)(block, FN(left_integers)(part, rows, dim, block->mlp_norm, eps), rows);
            FN(blocks_many)(&down, 1, h, rows);
#endif
        } else {
            mm_t *h = scratch(SHARED, 7, sizeof(mm_t) * (size_t)(round_up(rows, 32) * round_up(ffn_dim, MM_K)));
            FN(gated_many)(block, FN(left_operand)(part, rows, dim, block->mlp_norm, eps), rows, h);
            FN(linear_many)(&down, 1, h, rows);
        }
        if (norm)
            FN(add_rms_norm)(out, norm, eps, part, rows, dim);
    }
}
