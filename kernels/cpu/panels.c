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

INLINE vf widened(vu word, int shift, vf d, vf offset) { return __builtin_convertvector((vi)(word >> shift & splat_u(255)), vf) * d + offset; }

INLINE void unpack(const int kind, const uint8_t *source, int64_t n_in, mm_t *panel)
{
    const int groups = FACTS[kind].columns / 4;
    for (int64_t b = 0; b < n_in / BLOCK; b++) {
        const PanelBlock block = panel_block(kind, source, n_in, b);
        for (int rows = 0; rows < PANEL; rows += VW)
            UNROLLED
            for (int part = 0; part < parts(kind); part++) {
                const vf d = scale_of(kind, &block, rows, part), offset = offset_of(kind, &block, rows) - d * splat((float)FACTS[kind].shift);
                UNROLLED
                for (int g = groups * part; g < groups * (part + 1); g++) {
                    const vu word = quad(kind, &block, rows, g);
                    const int64_t column = BLOCK * b + 4 * g;
                    put_pair(panel, column, rows, widened(word, 0, d, offset), widened(word, 8, d, offset));
                    put_pair(panel, column + 2, rows, widened(word, 16, d, offset), widened(word, 24, d, offset));
                }
            }
    }
}

void FN(mm_pack_weight)(const Matrix *w, int64_t p, mm_t *panel)
{
#define CASE(kind) case kind: unpack(kind, panel_of(w, p), w->n_in, panel); return;
    switch (w->kind) {
    FOR_BLOCK_KINDS(CASE)
    }
#undef CASE
    const void *rows[PANEL];
    int64_t row_bytes = (int64_t)w->n_in * (w->kind == F32 ? 4 : 2);
    for (int r = 0; r < PANEL; r++)
        rows[r] = PANEL * p + r < w->n_out ? (const uint8_t *)w->data + (PANEL * p + r) * row_bytes : NULL;
    FN(mm_pack_rows)(w->kind, rows, w->n_in, panel);
}

/* Row `row` of a panel (n_in,): what is read of its neighbours in a register is left. */
INLINE void panel_row(const int kind, const uint8_t *panel, int64_t n_in, int row, float *out)
{
    const int first = row / VW * VW, lane = row % VW, groups = FACTS[kind].columns / 4;
    for (int64_t b = 0; b < n_in / BLOCK; b++) {
        const PanelBlock block = panel_block(kind, panel, n_in, b);
        const float offset = offset_of(kind, &block, first)[lane];
        UNROLLED
        for (int g = 0; g < BLOCK / 4; g++) {
            const float d = scale_of(kind, &block, first, g / groups)[lane];
            const uint32_t word = quad(kind, &block, first, g)[lane];
            for (int i = 0; i < 4; i++)
                out[BLOCK * b + 4 * g + i] = d * (float)((int)(word >> 8 * i & 255) - FACTS[kind].shift) + offset;
        }
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
#define CASE(kind) case kind: panel_row(kind, panel_of(w, id / PANEL), n_in, (int)(id % PANEL), out); return;
    switch (w->kind) {
    case F32:
        memcpy(out, (const float *)w->data + id * n_in, 4 * (size_t)n_in);
        return;
    case F16:
        for (int64_t k = 0; k < n_in; k++)
            out[k] = f16_to_float(halves[k]);
        return;
    case BF16:
        for (int64_t k = 0; k < n_in; k++)
            out[k] = bf16_to_float(halves[k]);
        return;
    FOR_BLOCK_KINDS(CASE)
    }
#undef CASE
}

/* out (n, n_in) = rows `ids` of w. */
void FN(rows)(const Matrix *w, const int64_t *ids, int64_t n, float *out)
{
    Rows c = {w, ids, out};
    parallel(n, one_row, &c);
}
