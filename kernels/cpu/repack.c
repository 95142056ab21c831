/* The blocks of a GGUF file, as stored (out, bytes of a row), into the panels of panels.h. */
#include "file_blocks.h"

typedef struct {
    int32_t kind, n_out, n_in;
    const uint8_t *stored;
    uint8_t *panels;
} Repack;

INLINE void put_word(uint8_t *to, uint32_t word) { memcpy(to, &word, 4); }

/* Quants (8 words) into row `row` of a panel's block. */
INLINE void put_quants(const int kind, uint8_t *block, int64_t row, const uint32_t *quants)
{
    uint8_t *at = block + 4 * row;
    if (FACTS[kind].bits == 8) {
        for (int g = 0; g < 8; g++)
            put_word(at + 64 * g, quants[g]);
        return;
    }
    for (int g = 0; g < 4; g++)
        put_word(at + 64 * g, (quants[g] & 0x0f0f0f0f) | (quants[4 + g] & 0x0f0f0f0f) << 4);
    uint32_t high[2] = {0};
    if (FACTS[kind].bits == 5) {
        for (int g = 0; g < 8; g++)
            high[0] |= (quants[g] >> 4 & 0x01010101) << g;
        put_word(at + 256, high[0]);
    }
    if (FACTS[kind].bits == 6)
        for (int half = 0; half < 2; half++) {
            for (int g = 0; g < 4; g++)
                high[half] |= (quants[4 * half + g] >> 4 & 0x03030303) << 2 * g;
            put_word(at + 256 + 64 * half, high[half]);
        }
}

/* Span s of the columns, of which it is number i of a block of the file. */
INLINE void put_span(const int kind, uint8_t *panel, int64_t n_in, int64_t s, int64_t row, const FileBlock *from, int i)
{
    const int blocks = FACTS[kind].span / BLOCK, n_scales = scales_of_span(kind) / PANEL / (1 + FACTS[kind].offsets);
    const PanelBlock first = panel_block(kind, panel, n_in, s * blocks);
    for (int b = 0; b < blocks; b++)
        put_quants(kind, (uint8_t *)first.quants + b * quant_bytes(kind), row, from->quants + 8 * (i * blocks + b));
    uint8_t *scales = (uint8_t *)first.scales, *halves = scales + scales_of_span(kind) + 2 * row;
    for (int j = 0; j < n_scales; j++)
        scales[PANEL * j + row] = (uint8_t)from->scales[j];
    memcpy(halves, from->d + i, 2);
    if (!FACTS[kind].offsets)
        return;
    for (int j = 0; j < n_scales; j++)
        scales[PANEL * (n_scales + j) + row] = (uint8_t)from->mins[j];
    memcpy(halves + 2 * PANEL, from->m + i, 2);
}

INLINE void repack_panel(const int kind, const int columns, const int bytes, const int held, const Repack *c, int64_t p)
{
    const int64_t n_blocks = c->n_in / columns, size = panel_bytes(held, c->n_in);
    const int spans = columns / FACTS[held].span;
    uint8_t *panel = c->panels + p * size;
    memset(panel, 0, (size_t)size);
    for (int64_t row = 0; row < PANEL && PANEL * p + row < c->n_out; row++) {
        const uint8_t *stored = c->stored + (PANEL * p + row) * n_blocks * bytes;
        for (int64_t b = 0; b < n_blocks; b++, stored += bytes) {
            FileBlock block;
            read_block(kind, stored, &block);
            for (int i = 0; i < spans; i++)
                put_span(held, panel, c->n_in, spans * b + i, row, &block, i);
        }
    }
}

static void one_panel(void *context, int64_t p, int thread)
{
    (void)thread;
    const Repack *c = context;
#define CASE(kind, columns, bytes, held) case kind: repack_panel(kind, columns, bytes, held, c, p); return;
    switch (c->kind) {
    FOR_FILE_KINDS(CASE)
    }
#undef CASE
}

/* Bytes of the panels that a matrix of this kind of blocks becomes. */
EXPORT int64_t minillm_panels_bytes(int kind, int n_out, int n_in)
{
#define CASE(kind, columns, bytes, held) case kind: return round_up(n_out, PANEL) / PANEL * panel_bytes(held, n_in);
    switch (kind) {
    FOR_FILE_KINDS(CASE)
    }
#undef CASE
    return 0;
}

/* kind: that of the file. */
EXPORT void minillm_repack(int kind, int n_out, int n_in, const uint8_t *stored, uint8_t *panels)
{
    Repack c = {kind, n_out, n_in, stored, panels};
    parallel(round_up(n_out, PANEL) / PANEL, one_panel, &c);
}
