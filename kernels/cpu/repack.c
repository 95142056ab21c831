/* The blocks of a GGUF file, as stored (out, bytes of a row), into the panels of panels.h: 4-byte words change places. */
#include "minillm_cpu.h"

#include <string.h>

typedef struct {
    int32_t kind, n_out, n_in;
    const uint8_t *stored;
    uint8_t *panels;
} Repack;

static void one_panel(void *context, int64_t p, int thread)
{
    (void)thread;
    const Repack *c = context;
    int64_t n_blocks = c->n_in / BLOCK, n_scales = c->kind == Q4_1 ? 2 : 1, words = c->kind == Q8_0 ? 8 : 4;
    int64_t stored_block = 2 * n_scales + 4 * words, quants = 64 * words;
    int64_t panel_bytes = round_up(n_blocks * (quants + 32 * n_scales), 64);
    uint8_t *panel = c->panels + p * panel_bytes;
    uint32_t flip = c->kind == Q8_0 ? 0x80808080u : 0;
    memset(panel, 0, (size_t)panel_bytes);
    for (int64_t row = 0; row < PANEL && PANEL * p + row < c->n_out; row++) {
        const uint8_t *source = c->stored + (PANEL * p + row) * n_blocks * stored_block;
        for (int64_t b = 0; b < n_blocks; b++, source += stored_block) {
            for (int64_t s = 0; s < n_scales; s++)
                memcpy(panel + n_blocks * quants + 2 * (PANEL * (s * n_blocks + b) + row), source + 2 * s, 2);
            for (int64_t j = 0; j < words; j++) {
                uint32_t word;
                memcpy(&word, source + 2 * n_scales + 4 * j, 4);
                word ^= flip;
                memcpy(panel + b * quants + 64 * j + 4 * row, &word, 4);
            }
        }
    }
}

/* Bytes of the panels of a matrix. */
EXPORT int64_t minillm_panels_bytes(int kind, int n_out, int n_in)
{
    return round_up(n_out, PANEL) / PANEL * round_up(n_in / BLOCK * (kind == Q8_0 ? 544 : kind == Q4_0 ? 288 : 320), 64);
}

EXPORT void minillm_repack(int kind, int n_out, int n_in, const uint8_t *stored, uint8_t *panels)
{
    Repack c = {kind, n_out, n_in, stored, panels};
    parallel(round_up(n_out, PANEL) / PANEL, one_panel, &c);
}
