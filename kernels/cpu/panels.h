/* How quantised matrices lie in memory, and what reads them.
 *
 * A panel is 16 rows. Of each block of 32 columns it holds first the quants of all blocks, then the scales:
 *   Q8_0          [blocks][8 groups][16 rows][4 columns] uint8, q + 128;     d [blocks][16] float16
 *   Q4_0, Q4_1    [blocks][4 groups][16 rows][4 columns] bytes: low half column 4 g + c, high half 16 + 4 g + c; d, and m for Q4_1
 * so that one register holds the same 4 columns of 16 rows: vpdpbusd multiplies them with 4 activations for all rows at once and
 * no sum across a register is ever taken. In the file's order (a row's 18 to 34 bytes after one another) the same product was
 * bound by instructions, not by memory. The size is the file's, rounded up to 64 bytes a panel. */
#ifndef MINILLM_PANELS_H
#define MINILLM_PANELS_H

#include "minillm_cpu.h"
#include "mm.h"

INLINE int64_t quant_bytes(int kind) { return kind == Q8_0 ? 512 : 256; } /* of a block of 16 rows */
INLINE int64_t panel_bytes(int kind, int64_t n_in)
{
    return round_up(n_in / BLOCK * (quant_bytes(kind) + (kind == Q4_1 ? 64 : 32)), 64);
}
INLINE const uint8_t *panel_of(const Matrix *w, int64_t p) { return (const uint8_t *)w->data + p * panel_bytes(w->kind, w->n_in); }
INLINE const uint16_t *panel_scales(int kind, const uint8_t *panel, int64_t n_in)
{
    return (const uint16_t *)(panel + n_in / BLOCK * quant_bytes(kind));
}

/* Rows 16 p ... of w as a panel of mm.h. */
void FN(mm_pack_weight)(const Matrix *w, int64_t p, mm_t *panel);

#endif
