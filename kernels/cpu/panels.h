/* How quantised matrices lie in memory, and what reads them. Whatever differs between kinds of blocks is here.
 *
 * A panel is 16 rows: first the quants of all blocks of 32 columns, then the scales. A quant is unsigned, `shift` larger than the number
 * it stands for; a weight is scale * (quant - shift) + offset. Quants of a block, of 4, 5, 6 or 8 bits:
 *   8 bits    [8 groups][16 rows][4 columns] bytes
 *   fewer     [4 groups][16 rows][4 columns] bytes: low half column 4 g + c, high half 16 + 4 g + c
 *   5         and [16 rows][4 columns] bytes: bit g belongs to column 4 g + c
 *   6         and [2 halves][16 rows][4 columns] bytes: bits 2 g and 2 g + 1 belong to column 16 half + 4 g + c
 * so that one register holds the same 4 columns of 16 rows: vpdpbusd multiplies them with 4 activations for all rows at once and
 * no sum across a register is ever taken. In the file's order (a row's 18 to 34 bytes after one another) the same product was
 * bound by instructions, not by memory. Scales, of as many columns as lie in a block of the file:
 *   32        d [16 rows] float16; if there are offsets, m [16] float16
 *   256       scales [256 / columns][16] int8; if there are offsets, mins [8][16] int8; d [16] float16, and with offsets dmin [16]:
 *             scale d * scales, offset -dmin * mins
 * The size is the file's, rounded up to 64 bytes a panel; of Q4_K and Q5_K, whose scales have 6 bits in a file, 1.03 times that. */
#ifndef MINILLM_PANELS_H
#define MINILLM_PANELS_H

#include "minillm_cpu.h"
#include "mm.h"

typedef struct {
    int bits, shift;   /* of a quant */
    int columns, span; /* columns that share a scale; columns whose scales lie together, a block of the file */
    int offsets;       /* whether there are any */
} Facts;

static const Facts FACTS[] = {
    [Q8_0] = {8, 128, 32, 32, 0}, [Q4_0] = {4, 8, 32, 32, 0}, [Q4_1] = {4, 0, 32, 32, 1},
    [Q5_0] = {5, 16, 32, 32, 0},  [Q5_1] = {5, 0, 32, 32, 1},
    [Q4_K] = {4, 0, 32, 256, 1},  [Q5_K] = {5, 0, 32, 256, 1}, [Q6_K] = {6, 32, 16, 256, 0},
};
#define FOR_BLOCK_KINDS(X) X(Q8_0) X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q4_K) X(Q5_K) X(Q6_K)

INLINE int is_blocks(int kind) { return kind >= Q8_0; }
INLINE int parts(int kind) { return BLOCK / FACTS[kind].columns; }                /* of a block, each with a scale */
INLINE int64_t quant_bytes(int kind) { return PANEL * BLOCK / 8 * FACTS[kind].bits; } /* of a block of 16 rows */
INLINE int scales_of_span(int kind) { return FACTS[kind].span == BLOCK ? 0 : PANEL * (FACTS[kind].span / FACTS[kind].columns) * (1 + FACTS[kind].offsets); }
INLINE int64_t scale_bytes(int kind) { return scales_of_span(kind) + 2 * PANEL * (1 + FACTS[kind].offsets); } /* of a span */
INLINE int64_t panel_bytes(int kind, int64_t n_in)
{
    return round_up(n_in / BLOCK * quant_bytes(kind) + n_in / FACTS[kind].span * scale_bytes(kind), 64);
}
INLINE const uint8_t *panel_of(const Matrix *w, int64_t p) { return (const uint8_t *)w->data + p * panel_bytes(w->kind, w->n_in); }

/* Block b of a panel: where its quants and its scales are. In a span it is block `number`. */
typedef struct {
    const uint8_t *quants, *scales;
    int64_t number;
} PanelBlock;

INLINE PanelBlock panel_block(const int kind, const uint8_t *panel, int64_t n_in, int64_t b)
{
    const int64_t blocks = FACTS[kind].span / BLOCK;
    return (PanelBlock){panel + quant_bytes(kind) * b, panel + quant_bytes(kind) * (n_in / BLOCK) + b / blocks * scale_bytes(kind), b % blocks};
}

/* Of VW rows from `row` on, in constants `kind` and g: the quants of columns 4 g ... 4 g + 3 of a block, a byte each. */
INLINE vu quad(const int kind, const PanelBlock *block, int row, const int g)
{
    const uint8_t *at = block->quants + 4 * row;
    if (FACTS[kind].bits == 8)
        return load_u(at + 64 * g);
    const vu low = load_u(at + 64 * (g % 4)) >> (g < 4 ? 0 : 4) & splat_u(0x0f0f0f0f);
    if (FACTS[kind].bits == 5)
        return low | (load_u(at + 256) >> g & splat_u(0x01010101)) << 4;
    if (FACTS[kind].bits == 6)
        return low | (load_u(at + 256 + 64 * (g / 4)) >> 2 * (g % 4) & splat_u(0x03030303)) << 4;
    return low;
}

/* Of VW rows: scale and offset of part `part` of a block. */
INLINE vf scale_of(const int kind, const PanelBlock *block, int row, int part)
{
    const uint16_t *d = (const uint16_t *)(block->scales + scales_of_span(kind)) + row;
    if (FACTS[kind].span == BLOCK)
        return load_f16(d);
    return load_i8((const int8_t *)block->scales + PANEL * (block->number * parts(kind) + part) + row) * load_f16(d);
}

INLINE vf offset_of(const int kind, const PanelBlock *block, int row)
{
    const uint16_t *m = (const uint16_t *)(block->scales + scales_of_span(kind)) + PANEL + row;
    if (!FACTS[kind].offsets)
        return splat(0);
    if (FACTS[kind].span == BLOCK)
        return load_f16(m);
    return -(load_i8((const int8_t *)block->scales + scales_of_span(kind) / 2 + PANEL * block->number + row) * load_f16(m));
}

/* Rows 16 p ... of w as a panel of mm.h. */
void FN(mm_pack_weight)(const Matrix *w, int64_t p, mm_t *panel);

#endif
