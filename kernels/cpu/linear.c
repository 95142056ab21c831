/* y = x W^T + bias for a few products of the same x (n, n_in): q, k and v, or gate and up, are one parallel region. Many rows: many.c.
 *
 * Few rows: a weight is read once and used at once. Blocks meet activations of 16 bits, 32 to a scale, as two int8 halves:
 * q = 256 hi + lo. One half alone (llama.cpp's Q8_0 activations) cost the default model 5 % of its logits and other words; the
 * second costs arithmetic that hides behind the reading of the weights. Other kinds meet float32 activations. */
#include "many_blocks.h"
#include "panels.h"

#include <assert.h>

enum { NR = 4 };        /* rows of x that a register's worth of weights is used for */
enum { NV = PANEL / VW }; /* vectors of a panel's row */
enum { HALF = 16 };     /* columns whose activations are summed: what shares a scale is one of these or two */

#if defined(MINILLM_AMX)
enum { FEW_BLOCKS = 8, FEW_FLOATS = 4 }; /* rows up to which the first way is faster */
#else
enum { FEW_BLOCKS = 16, FEW_FLOATS = 4 };
#endif

typedef struct {
    const Product *products;
    int count;
    const float *x;
    int64_t n, n_in, n_units;
    int64_t end[MAX_PRODUCTS]; /* units of the products up to this one */
    const int8_t *q;           /* (n, 2, n_in) x as hi and lo */
    const float *d;            /* (n, n_in / 32) scales */
    const int32_t *total;      /* (n, n_in / 16) sums of q */
} Linear;

int FN(all_blocks)(const Product *products, int count)
{
    int blocks = 1;
    for (int i = 0; i < count; i++)
        blocks &= is_blocks(products[i].w.kind);
    return blocks;
}

/* Whether so few rows are computed faster weight by weight. */
int FN(few)(const Product *products, int count, int64_t n)
{
    return n <= (FN(all_blocks)(products, count) ? FEW_BLOCKS : FEW_FLOATS);
}

static void quantise_row(void *context, int64_t row, int thread)
{
    (void)thread;
    const Linear *c = context;
    const float *x = c->x + row * c->n_in;
    int64_t n_blocks = c->n_in / BLOCK;
    int8_t *q = (int8_t *)c->q + row * 2 * c->n_in;
    float *d = (float *)c->d + row * n_blocks;
    int32_t *total = (int32_t *)c->total + row * 2 * n_blocks;
    for (int64_t b = 0; b < n_blocks; b++, x += BLOCK, q += BLOCK, total += 2) {
        vf peak = splat(0), bad = splat(0); /* bad becomes NaN where x is not finite, which a maximum may lose */
        for (int i = 0; i < BLOCK; i += VW) {
            peak = vmax(peak, (vf)((vi)load(x + i) & (vi)splat_u(0x7fffffff)));
            bad += load(x + i) * splat(0);
        }
        float most_ = largest(peak), inverse = most_ > 1e-30f ? 32512.0f / most_ : 0; /* 127 * 256 */
        d[b] = most_ / 32512.0f + sum(bad);
        if (d[b] != d[b]) { /* zeros times NaN: what comes of it is NaN, and found */
            memset(q, 0, BLOCK);
            memset(q + c->n_in, 0, BLOCK);
            total[0] = total[1] = 0;
            continue;
        }
        for (int half = 0; half < 2; half++) {
            vi sums = (vi)splat_u(0);
            for (int i = HALF * half; i < HALF * (half + 1); i += VW) {
                /* 1.5 * 2^23 added: the low bits of the float are the nearest integer */
                vi near = (vi)(load(x + i) * splat(inverse) + splat(12582912.0f)) - (vi)splat(12582912.0f);
                vi hi = (near + 128) >> 8, lo = near - (hi << 8);
                lo -= lo == -128; /* + 1: -lo must be an int8 as well, see vpsignb below */
                sums += (hi << 8) + lo;
                vb high_bytes = __builtin_convertvector(hi, vb), low_bytes = __builtin_convertvector(lo, vb);
                memcpy(q + i, &high_bytes, sizeof high_bytes);
                memcpy(q + c->n_in + i, &low_bytes, sizeof low_bytes);
            }
            total[half] = 0;
            for (int i = 0; i < VW; i++)
                total[half] += sums[i];
        }
    }
}

#if defined(__AVX512VNNI__)
INLINE __m512i four(const int8_t *x) { int32_t word; memcpy(&word, x, 4); return _mm512_set1_epi32(word); }
#elif defined(__AVX2__)
INLINE __m256i four(const int8_t *x) { int32_t word; memcpy(&word, x, 4); return _mm256_set1_epi32(word); }
#endif

/* The sum of the activations that meet a part of a block. */
INLINE int32_t total_of(const int kind, const int32_t *total, int part) { return FACTS[kind].columns == HALF ? total[part] : total[0] + total[1]; }

/* dot[r] = the sums of (quant - shift) * x over a part of a block, of the panel's 16 rows and rows r of x: q (2, n_in) of each, total. They
 * are whole numbers of 32 bits: scales, which are more bits in K-quants, come after. */
INLINE void part_dots(const int kind, const int rows, const PanelBlock *block, const int part, const int8_t *q, int64_t n_in, const int32_t *total, vi dot[NR][NV])
{
    const int first = FACTS[kind].columns / 4 * part, last = first + FACTS[kind].columns / 4;
#if defined(__AVX512VNNI__)
    __m512i sums[NR][2];
    UNROLLED
    for (int r = 0; r < rows; r++) {
        sums[r][0] = _mm512_setzero_si512();
        sums[r][1] = _mm512_set1_epi32(-FACTS[kind].shift * total_of(kind, total + r * (n_in / HALF), part));
    }
    UNROLLED
    for (int g = first; g < last; g++) {
        const __m512i word = (__m512i)quad(kind, block, 0, g);
        UNROLLED
        for (int r = 0; r < rows; r++)
            UNROLLED
            for (int half = 0; half < 2; half++)
                sums[r][half] = _mm512_dpbusd_epi32(sums[r][half], word, four(q + (2 * r + half) * n_in + 4 * g));
    }
    UNROLLED
    for (int r = 0; r < rows; r++)
        dot[r][0] = (vi)_mm512_add_epi32(_mm512_slli_epi32(sums[r][0], 8), sums[r][1]);
#elif defined(__AVX2__)
    /* Products of a quant and an int8, two to a lane of 16 bits, are added while they fit. Two of 8 bits do not: those meet as signed ones. */
    enum { PRODUCTS = 2 * 127 };
    const int wide = FACTS[kind].bits == 8, together = wide ? 1 : (int)least(32767 / (PRODUCTS * ((1 << FACTS[kind].bits) - 1)), last - first) & ~1;
    const __m256i ones = _mm256_set1_epi16(1);
    UNROLLED
    for (int v = 0; v < NV; v++) {
        __m256i sums[NR][2];
        UNROLLED
        for (int r = 0; r < rows; r++) {
            sums[r][0] = _mm256_setzero_si256();
            sums[r][1] = _mm256_set1_epi32(wide ? 0 : -FACTS[kind].shift * total_of(kind, total + r * (n_in / HALF), part));
        }
        UNROLLED
        for (int g = first; g < last; g += together) {
            __m256i word[8];
            UNROLLED
            for (int t = 0; t < together; t++)
                word[t] = (__m256i)quad(kind, block, VW * v, g + t);
            if (wide)
                word[0] = _mm256_xor_si256(word[0], _mm256_set1_epi8(-128));
            UNROLLED
            for (int r = 0; r < rows; r++)
                UNROLLED
                for (int half = 0; half < 2; half++) {
                    const int8_t *x = q + (2 * r + half) * n_in + 4 * g;
                    __m256i pairs = wide ? _mm256_maddubs_epi16(_mm256_abs_epi8(word[0]), _mm256_sign_epi8(four(x), word[0])) : _mm256_maddubs_epi16(word[0], four(x));
                    UNROLLED
                    for (int t = 1; t < together; t++)
                        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(word[t], four(x + 4 * t)));
                    sums[r][half] = _mm256_add_epi32(sums[r][half], _mm256_madd_epi16(pairs, ones));
                }
        }
        UNROLLED
        for (int r = 0; r < rows; r++)
            dot[r][v] = (vi)_mm256_add_epi32(_mm256_slli_epi32(sums[r][0], 8), sums[r][1]);
    }
#else
    for (int r = 0; r < rows; r++) {
        const int8_t *hi = q + 2 * r * n_in, *lo = hi + n_in;
        int32_t x[BLOCK];
        for (int i = 4 * first; i < 4 * last; i++)
            x[i] = 256 * hi[i] + lo[i];
        UNROLLED
        for (int v = 0; v < NV; v++) {
            vi sums = (vi)splat_u((uint32_t)(-FACTS[kind].shift * total_of(kind, total + r * (n_in / HALF), part)));
            UNROLLED
            for (int g = first; g < last; g++) {
                const vu word = quad(kind, block, VW * v, g);
                for (int j = 0; j < 4; j++)
                    sums += (vi)(word >> 8 * j & splat_u(255)) * (vi)splat_u((uint32_t)x[4 * g + j]);
            }
            dot[r][v] = sums;
        }
    }
#endif
}

/* out[r][0..15] = the products of a panel's rows with rows r of x. `row`: their first row.
 *
 * While a block is multiplied, the same block of the next panel is fetched. A panel is too short (6 KiB for 576 columns of Q4_1) for the
 * processor to find its two streams, quants and scales, before it ends: reading took 1.6 times its floor, and so takes 1.2. */
INLINE void blocks_panel(const int kind, const int rows, const Linear *c, const Matrix *w, int64_t p, int64_t row, float out[NR][PANEL])
{
    const uint8_t *panel = panel_of(w, p);
    const int64_t n_in = c->n_in, n_blocks = n_in / BLOCK, ahead = panel_bytes(kind, n_in);
    const int8_t *q = c->q + row * 2 * n_in;
    const float *d = c->d + row * n_blocks;
    const int32_t *total = c->total + row * 2 * n_blocks;
    vf sums[NR][NV];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < NV; v++)
            sums[r][v] = splat(0);
    for (int64_t b = 0; b < n_blocks; b++) {
        const PanelBlock block = panel_block(kind, panel, n_in, b);
        for (int64_t line = 0; line < quant_bytes(kind); line += 64)
            __builtin_prefetch(block.quants + ahead + line);
        if (64 * block.number < scale_bytes(kind))
            __builtin_prefetch(block.scales + ahead + 64 * block.number);
        UNROLLED
        for (int part = 0; part < parts(kind); part++) {
            vi dot[NR][NV];
            part_dots(kind, rows, &block, part, q + BLOCK * b, n_in, total + 2 * b, dot);
            UNROLLED
            for (int v = 0; v < NV; v++) {
                const vf scale = scale_of(kind, &block, VW * v, part), offset = offset_of(kind, &block, VW * v);
                UNROLLED
                for (int r = 0; r < rows; r++) {
                    const float dx = d[r * n_blocks + b];
                    sums[r][v] += __builtin_convertvector(dot[r][v], vf) * (scale * splat(dx));
                    if (FACTS[kind].offsets)
                        sums[r][v] += offset * splat(dx * (float)total_of(kind, total + r * 2 * n_blocks + 2 * b, part));
                }
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < NV; v++)
            store(out[r] + VW * v, sums[r][v]);
}

INLINE vf load_kind(const int kind, const uint8_t *row, int64_t i)
{
    if (kind == F32)
        return load((const float *)row + i);
    return kind == F16 ? load_f16((const uint16_t *)row + i) : load_bf16((const uint16_t *)row + i);
}

INLINE float load_one(const int kind, const uint8_t *row, int64_t i)
{
    if (kind == F32)
        return ((const float *)row)[i];
    return kind == F16 ? f16_to_float(((const uint16_t *)row)[i]) : bf16_to_float(((const uint16_t *)row)[i]);
}

/* The same for a matrix of 16- or 32-bit floats; 4 rows of W at a time, so that 4 sums hide one another's latency. */
INLINE void floats_panel(const int kind, const int rows, const Linear *c, const Matrix *w, int64_t p, int64_t first, float out[NR][PANEL])
{
    const int64_t n_in = c->n_in, row_bytes = n_in * (kind == F32 ? 4 : 2);
    const float *x = c->x + first * n_in;
    for (int64_t o = 0; o < PANEL && PANEL * p + o < w->n_out; o += 4) {
        const uint8_t *row[4];
        for (int j = 0; j < 4; j++) /* past the last row: the last once more */
            row[j] = (const uint8_t *)w->data + least(PANEL * p + o + j, w->n_out - 1) * row_bytes;
        vf sums[4][NR];
        for (int j = 0; j < 4; j++)
            for (int r = 0; r < rows; r++)
                sums[j][r] = splat(0);
        int64_t i = 0;
        for (; i + VW <= n_in; i += VW)
            for (int j = 0; j < 4; j++) {
                __builtin_prefetch(row[j] + 4 * row_bytes + i * (row_bytes / n_in)); /* four rows on */
                vf word = load_kind(kind, row[j], i);
                for (int r = 0; r < rows; r++)
                    sums[j][r] += word * load(x + r * n_in + i);
            }
        for (int j = 0; j < 4; j++)
            for (int r = 0; r < rows; r++) {
                float total = sum(sums[j][r]);
                for (int64_t k = i; k < n_in; k++)
                    total += load_one(kind, row[j], k) * x[r * n_in + k];
                out[r][o + j] = total;
            }
    }
}

#define FOR_ROWS(panel, kind)                                        \
    switch (rows) {                                                  \
    case 1: panel(kind, 1, c, w, p, first, out); return;             \
    case 2: panel(kind, 2, c, w, p, first, out); return;             \
    case 3: panel(kind, 3, c, w, p, first, out); return;             \
    default: panel(kind, 4, c, w, p, first, out); return;            \
    }

static void panel_product(const Linear *c, const Matrix *w, int64_t p, int64_t first, int64_t rows, float out[NR][PANEL])
{
#define CASE(kind) case kind: FOR_ROWS(blocks_panel, kind)
    switch (w->kind) {
    case F32: FOR_ROWS(floats_panel, F32)
    case F16: FOR_ROWS(floats_panel, F16)
    case BF16: FOR_ROWS(floats_panel, BF16)
    FOR_BLOCK_KINDS(CASE)
    }
#undef CASE
}

static void few_rows(void *context, int64_t unit, int thread)
{
    (void)thread;
    const Linear *c = context;
    int64_t local;
    const Product *product = product_of(c->products, c->end, unit, &local);
    for (int64_t p = 2 * local; p < 2 * local + 2 && PANEL * p < product->w.n_out; p++)
        for (int64_t row = 0; row < c->n; row += NR) {
            float out[NR][PANEL] __attribute__((aligned(64)));
            int64_t rows = least(NR, c->n - row);
            panel_product(c, &product->w, p, row, rows, out);
            put(product, c->n, row, PANEL * p, out[0], PANEL, rows, least(PANEL, product->w.n_out - PANEL * p));
        }
}

/* All products have the same n_in; n_in of blocks is a multiple of 32. norm (n_in,) or NULL: x is rms_norm(x) * norm first. */
void FN(linear)(const Product *products, int count, const float *x, int64_t n, const float *norm, float eps)
{
    Linear c = {.products = products, .count = count, .x = x, .n = n, .n_in = products[0].w.n_in};
    int any_blocks = 0;
    assert(count <= MAX_PRODUCTS);
#if MANY_BLOCKS
    if (!FN(few)(products, count, n) && FN(all_blocks)(products, count)) {
        FN(blocks_many)(products, count, FN(left_integers)(x, n, c.n_in, norm, eps), n);
        return;
    }
#endif
    if (!FN(few)(products, count, n)) {
        FN(linear_many)(products, count, FN(left_operand)(x, n, c.n_in, norm, eps), n);
        return;
    }
    for (int i = 0; i < count; i++) {
        c.n_units += round_up(products[i].w.n_out, UNIT) / UNIT;
        c.end[i] = c.n_units;
        any_blocks |= is_blocks(products[i].w.kind);
    }
    if (norm) {
        c.x = scratch(SHARED, 1, sizeof(float) * (size_t)(n * c.n_in));
        FN(rms_norm)(x, norm, eps, (float *)c.x, n, c.n_in);
    }
    if (any_blocks) {
        size_t n_blocks = (size_t)(n * c.n_in / BLOCK);
        c.d = scratch(SHARED, 0, n_blocks * (4 + 8 + 2 * BLOCK));
        c.total = (const int32_t *)(c.d + n_blocks);
        c.q = (const int8_t *)(c.total + 2 * n_blocks);
        if (n * c.n_in > 1 << 14)
            parallel(n, quantise_row, &c);
        else
            for (int64_t row = 0; row < n; row++)
                quantise_row(&c, row, 0);
    }
    parallel(c.n_units, few_rows, &c);
}
