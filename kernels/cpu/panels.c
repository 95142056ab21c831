/* Reading the panels of panels.h: as the operand of a matrix product, and row by row (the embedding). */
#include "panels.h"

/* Two values of consecutive columns, 16 rows, VW rows at a time. */
INLINE void put_pair(mm_t *panel, int64_t column, int rows, vf even, vf odd)
{
#if MM_PAIR == 2
    /* to nearest, ties away from zero: two instructions less than ties to even */
    vu lo = ((vu)even + splat_u(0x8000)) >> 16, hi = ((vu)odd + splat_u(0x8000)) & splat_u(0xffff0000);
    vu pair = lo | hi;
    memcpy(panel + PANEL * column + 2 * rows, &pair, sizeof pair);
#else
    store(panel + PANEL * column + rows, even);
    store(panel + PANEL * (column + 1) + rows, odd);
#endif
}

INLINE vf widened(vu word, int shift, uint32_t mask, vf d, vf offset)
{
    return __builtin_convertvector((vi)((word >> shift) & splat_u(mask)), vf) * d + offset;
}

INLINE void unpack(int kind, const uint8_t *source, int64_t n_in, mm_t *panel)
{
    const uint16_t *scales = panel_scales(kind, source, n_in);
    int64_t n_blocks = n_in / BLOCK;
    for (int64_t b = 0; b < n_blocks; b++)
        for (int rows = 0; rows < PANEL; rows += VW) {
            vf d = load_f16(scales + PANEL * b + rows), offset;
            if (kind == Q4_1)
                offset = load_f16(scales + PANEL * (n_blocks + b) + rows);
            else
                offset = d * splat(kind == Q8_0 ? -128.0f : -8.0f);
            const uint8_t *quants = source + quant_bytes(kind) * b + 4 * rows;
            for (int g = 0; g < (kind == Q8_0 ? 8 : 4); g++) {
                vu word = load_u(quants + 64 * g);
                int64_t column = BLOCK * b + 4 * g;
                if (kind == Q8_0) {
                    put_pair(panel, column, rows, widened(word, 0, 255, d, offset), widened(word, 8, 255, d, offset));
                    put_pair(panel, column + 2, rows, widened(word, 16, 255, d, offset), widened(word, 24, 255, d, offset));
                } else {
                    put_pair(panel, column, rows, widened(word, 0, 15, d, offset), widened(word, 8, 15, d, offset));
                    put_pair(panel, column + 2, rows, widened(word, 16, 15, d, offset), widened(word, 24, 15, d, offset));
                    put_pair(panel, column + 16, rows, widened(word, 4, 15, d, offset), widened(word, 12, 15, d, offset));
                    put_pair(panel, column + 18, rows, widened(word, 20, 15, d, offset), widened(word, 28, 15, d, offset));
                }
            }
        }
}

void FN(mm_pack_weight)(const Matrix *w, int64_t p, mm_t *panel)
{
    const uint8_t *source = w->data;
    if (w->kind == Q8_0)
        unpack(Q8_0, panel_of(w, p), w->n_in, panel);
    else if (w->kind == Q4_0)
        unpack(Q4_0, panel_of(w, p), w->n_in, panel);
    else if (w->kind == Q4_1)
        unpack(Q4_1, panel_of(w, p), w->n_in, panel);
    else {
        const void *rows[PANEL];
        int64_t row_bytes = (int64_t)w->n_in * (w->kind == F32 ? 4 : 2);
        for (int r = 0; r < PANEL; r++)
            rows[r] = PANEL * p + r < w->n_out ? source + (PANEL * p + r) * row_bytes : NULL;
        FN(mm_pack_rows)(w->kind, rows, w->n_in, panel);
    }
}

typedef struct {
    const Matrix *w;
    const int64_t *ids;
    float *out;
} Rows;

static void one_row(void *context, int64_t i, int thread)
{
    (void)thread;
    const Rows *c = context;
    const Matrix *w = c->w;
    int64_t id = c->ids[i], n_in = w->n_in;
    float *out = c->out + i * n_in;
    const uint16_t *halves = (const uint16_t *)w->data + id * n_in;
    if (w->kind == F32) {
        memcpy(out, (const float *)w->data + id * n_in, 4 * (size_t)n_in);
    } else if (w->kind == F16) {
        for (int64_t k = 0; k < n_in; k++)
            out[k] = f16_to_float(halves[k]);
    } else if (w->kind == BF16) {
        for (int64_t k = 0; k < n_in; k++)
            out[k] = bf16_to_float(halves[k]);
    } else {
        const uint8_t *panel = panel_of(w, id / PANEL);
        const uint16_t *scales = panel_scales(w->kind, panel, n_in);
        int64_t row = id % PANEL, n_blocks = n_in / BLOCK;
        for (int64_t b = 0; b < n_blocks; b++) {
            float d = f16_to_float(scales[PANEL * b + row]);
            float m = w->kind == Q4_1 ? f16_to_float(scales[PANEL * (n_blocks + b) + row]) : 0;
            const uint8_t *quants = panel + quant_bytes(w->kind) * b + 4 * row;
            for (int k = 0; k < BLOCK; k++) {
                if (w->kind == Q8_0) {
                    out[BLOCK * b + k] = d * (float)(quants[64 * (k / 4) + k % 4] - 128);
                    continue;
                }
                int q = quants[64 * (k % 16 / 4) + k % 4] >> (k < 16 ? 0 : 4) & 15;
                out[BLOCK * b + k] = w->kind == Q4_0 ? d * (float)(q - 8) : d * (float)q + m;
            }
        }
    }
}

/* out (n, n_in) = rows `ids` of w. */
void FN(rows)(const Matrix *w, const int64_t *ids, int64_t n, float *out)
{
    Rows c = {w, ids, out};
    parallel(n, one_row, &c);
}
