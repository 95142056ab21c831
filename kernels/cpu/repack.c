/* The blocks of a GGUF file, as stored (out, bytes of a row), into the panels of panels.h: words of 4 bytes change places.
 *
 * A span (a block of the file) is read into the same form whatever its kind, and written from that. Of the layouts of ggml's blocks
 * see minillm/files/formats.py. */
#include "panels.h"

typedef struct {
    int32_t kind, n_out, n_in;
    const uint8_t *stored;
    uint8_t *panels;
} Repack;

enum { SPAN = 256, WORDS = SPAN / 4 };

typedef struct {
    uint32_t quants[WORDS];        /* unsigned, 4 columns to a word */
    int8_t scales[16], mins[8];    /* of K-quants */
    uint8_t halves[4];             /* d, and m or dmin: float16 */
} Span;

INLINE uint32_t word_at(const uint8_t *p) { uint32_t word; memcpy(&word, p, 4); return word; }

/* Words of two quants of 4 bits a byte: the low halves, then the high ones. */
INLINE void nibbles(const uint8_t *bytes, const int words, uint32_t *to)
{
    for (int j = 0; j < words; j++) {
        to[j] = word_at(bytes + 4 * j) & 0x0f0f0f0f;
        to[words + j] = word_at(bytes + 4 * j) >> 4 & 0x0f0f0f0f;
    }
}

/* 12 bytes of 8 scales and 8 mins, 6 bits each: ggml's get_scale_min_k4. */
INLINE void six_bits(const uint8_t *packed, Span *span)
{
    for (int j = 0; j < 4; j++) {
        span->scales[j] = packed[j] & 63;
        span->mins[j] = packed[4 + j] & 63;
        span->scales[4 + j] = (int8_t)((packed[8 + j] & 15) | packed[j] >> 6 << 4);
        span->mins[4 + j] = (int8_t)(packed[8 + j] >> 4 | packed[4 + j] >> 6 << 4);
    }
}

INLINE void read_span(const int kind, const uint8_t *stored, Span *span)
{
    switch (kind) {
    case Q8_0:
        memcpy(span->halves, stored, 2);
        for (int j = 0; j < 8; j++)
            span->quants[j] = word_at(stored + 2 + 4 * j) ^ 0x80808080u;
        return;
    case Q4_0:
        memcpy(span->halves, stored, 2);
        nibbles(stored + 2, 4, span->quants);
        return;
    case Q4_1:
        memcpy(span->halves, stored, 4);
        nibbles(stored + 4, 4, span->quants);
        return;
    case Q4_K: /* d, dmin, scales [12], quants [128] */
    case Q5_K: /* d, dmin, scales [12], high bits [32], quants [128] */
        memcpy(span->halves, stored, 4);
        six_bits(stored + 4, span);
        for (int pair = 0; pair < 4; pair++)
            nibbles(stored + (kind == Q4_K ? 16 : 48) + 32 * pair, 8, span->quants + 16 * pair);
        if (kind == Q5_K)
            for (int b = 0; b < 8; b++)
                for (int j = 0; j < 8; j++)
                    span->quants[8 * b + j] |= (word_at(stored + 16 + 4 * j) >> b & 0x01010101) << 4;
        return;
    case Q6_K: /* low bits [128], high bits [64], scales [16], d */
        memcpy(span->halves, stored + 208, 2);
        memcpy(span->scales, stored + 192, 16);
        for (int half = 0; half < 2; half++)
            for (int t = 0; t < 4; t++) /* blocks of 32 columns */
                for (int j = 0; j < 8; j++) {
                    const uint32_t low = word_at(stored + 64 * half + 32 * (t % 2) + 4 * j) >> (t < 2 ? 0 : 4) & 0x0f0f0f0f;
                    const uint32_t high = word_at(stored + 128 + 32 * half + 4 * j) >> 2 * t & 0x03030303;
                    span->quants[8 * (4 * half + t) + j] = low | high << 4;
                }
    }
}

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

INLINE void put_span(const int kind, uint8_t *panel, int64_t n_in, int64_t s, int64_t row, const Span *span)
{
    const int blocks = FACTS[kind].span / BLOCK, n_scales = scales_of_span(kind) / PANEL / (1 + FACTS[kind].offsets);
    const PanelBlock first = panel_block(kind, panel, n_in, s * blocks);
    for (int b = 0; b < blocks; b++)
        put_quants(kind, (uint8_t *)first.quants + b * quant_bytes(kind), row, span->quants + 8 * b);
    uint8_t *scales = (uint8_t *)first.scales, *halves = scales + scales_of_span(kind) + 2 * row;
    for (int j = 0; j < n_scales; j++)
        scales[PANEL * j + row] = (uint8_t)span->scales[j];
    memcpy(halves, span->halves, 2);
    if (!FACTS[kind].offsets)
        return;
    for (int j = 0; j < n_scales; j++)
        scales[PANEL * (n_scales + j) + row] = (uint8_t)span->mins[j];
    memcpy(halves + 2 * PANEL, span->halves + 2, 2);
}

INLINE void repack_panel(const int kind, int64_t stored_bytes, const Repack *c, int64_t p)
{
    const int64_t n_spans = c->n_in / FACTS[kind].span, size = panel_bytes(kind, c->n_in);
    uint8_t *panel = c->panels + p * size;
    memset(panel, 0, (size_t)size);
    for (int64_t row = 0; row < PANEL && PANEL * p + row < c->n_out; row++) {
        const uint8_t *stored = c->stored + (PANEL * p + row) * n_spans * stored_bytes;
        for (int64_t s = 0; s < n_spans; s++, stored += stored_bytes) {
            Span span;
            read_span(kind, stored, &span);
            put_span(kind, panel, c->n_in, s, row, &span);
        }
    }
}

static void one_panel(void *context, int64_t p, int thread)
{
    (void)thread;
    const Repack *c = context;
    switch (c->kind) {
    case Q8_0: repack_panel(Q8_0, 34, c, p); return;
    case Q4_0: repack_panel(Q4_0, 18, c, p); return;
    case Q4_1: repack_panel(Q4_1, 20, c, p); return;
    case Q4_K: repack_panel(Q4_K, 144, c, p); return;
    case Q5_K: repack_panel(Q5_K, 176, c, p); return;
    case Q6_K: repack_panel(Q6_K, 210, c, p); return;
    }
}

/* Bytes of the panels of a matrix. */
EXPORT int64_t minillm_panels_bytes(int kind, int n_out, int n_in) { return round_up(n_out, PANEL) / PANEL * panel_bytes(kind, n_in); }

EXPORT void minillm_repack(int kind, int n_out, int n_in, const uint8_t *stored, uint8_t *panels)
{
    Repack c = {kind, n_out, n_in, stored, panels};
    parallel(round_up(n_out, PANEL) / PANEL, one_panel, &c);
}
