/* y = x W^T + bias for a few products of the same x (n, n_in): q, k and v, or gate and up, are one parallel region. Many rows: many.c.
 *
 * Few rows: a weight is read once and used at once. Blocks meet activations of 16 bits, 32 to a scale, as two int8 halves:
 * q = 256 hi + lo. One half alone (llama.cpp's Q8_0 activations) cost the default model 5 % of its logits and other words; the
 * second costs arithmetic that hides behind the reading of the weights. Other kinds meet float32 activations. */
#include "many_blocks.h"
#include "panels.h"

#include <assert.h>

enum { NR = 4 };           /* rows of x that a register's worth of weights is used for */

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
    const int32_t *total;      /* (n, n_in / 32) sums of q */
} Linear;

INLINE int is_blocks(int kind) { return kind >= Q8_0; }

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
    int32_t *total = (int32_t *)c->total + row * n_blocks;
    for (int64_t b = 0; b < n_blocks; b++, x += BLOCK, q += BLOCK) {
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
            total[b] = 0;
            continue;
        }
        vi sums = (vi)splat_u(0);
        for (int i = 0; i < BLOCK; i += VW) {
            /* 1.5 * 2^23 added: the low bits of the float are the nearest integer */
            vi near = (vi)(load(x + i) * splat(inverse) + splat(12582912.0f)) - (vi)splat(12582912.0f);
            vi hi = (near + 128) >> 8, lo = near - (hi << 8);
            lo -= lo == -128; /* + 1: -lo must be an int8 as well, see vpsignb below */
            sums += (hi << 8) + lo;
            typedef int8_t vb __attribute__((vector_size(VW)));
            vb high_bytes = __builtin_convertvector(hi, vb), low_bytes = __builtin_convertvector(lo, vb);
            memcpy(q + i, &high_bytes, sizeof high_bytes);
            memcpy(q + c->n_in + i, &low_bytes, sizeof low_bytes);
        }
        int32_t s = 0;
        for (int i = 0; i < VW; i++)
            s += sums[i];
        total[b] = s;
    }
}

#if defined(__AVX512VNNI__)
INLINE __m512i four(const int8_t *x) { int32_t word; memcpy(&word, x, 4); return _mm512_set1_epi32(word); }
#elif defined(__AVX2__)
INLINE __m256i four(const int8_t *x) { int32_t word; memcpy(&word, x, 4); return _mm256_set1_epi32(word); }
#endif

/* While a block is multiplied, the same block of the next panel is fetched. A panel is too short (6 KiB for 576 columns of Q4_1) for the
 * processor to find its two streams, quants and scales, before it ends: reading took 1.6 times its floor, and so takes 1.2. */
#define FETCH_NEXT_PANEL                                                                \
    for (int64_t line = 0; line < quant_bytes(kind); line += 64)                        \
        __builtin_prefetch(block + ahead + line);                                       \
    for (int64_t row = 0; row < (kind == Q4_1 ? 2 : 1); row++)                          \
        __builtin_prefetch((const uint8_t *)(scales + PANEL * (row * n_blocks + b)) + ahead);

/* out[r][0..15] = the products of a panel's rows with rows r of x. `first`: their first row. */
INLINE void blocks_panel(const int kind, const int rows, const Linear *c, const Matrix *w, int64_t p, int64_t first, float out[NR][PANEL])
{
    const uint8_t *quants = panel_of(w, p);
    const uint16_t *scales = panel_scales(kind, quants, c->n_in);
    const int64_t n_blocks = c->n_in / BLOCK;
    const int8_t *q = c->q + first * 2 * c->n_in;
    const float *d = c->d + first * n_blocks;
    const int32_t *total = c->total + first * n_blocks;
    const int64_t ahead = panel_bytes(kind, c->n_in);
    const int32_t shift = kind == Q8_0 ? 128 : kind == Q4_0 ? 8 : 0; /* stored quants are that much larger */
#if defined(__AVX512VNNI__)
    const __m512i low = _mm512_set1_epi8(15);
    __m512 sums[NR];
    for (int r = 0; r < rows; r++)
        sums[r] = _mm512_setzero_ps();
    for (int64_t b = 0; b < n_blocks; b++) {
        __m512i dot[NR][2];
        for (int r = 0; r < rows; r++) {
            dot[r][0] = _mm512_setzero_si512();
            dot[r][1] = _mm512_set1_epi32(-shift * total[r * n_blocks + b]);
        }
        const uint8_t *block = quants + quant_bytes(kind) * b;
        FETCH_NEXT_PANEL
        for (int g = 0; g < (kind == Q8_0 ? 8 : 4); g++) {
            __m512i word = _mm512_load_si512(block + 64 * g), high_word = _mm512_and_si512(_mm512_srli_epi16(word, 4), low);
            if (kind != Q8_0)
                word = _mm512_and_si512(word, low);
            for (int r = 0; r < rows; r++)
                for (int half = 0; half < 2; half++) {
                    const int8_t *x = q + (2 * r + half) * c->n_in + BLOCK * b + 4 * g;
                    dot[r][half] = _mm512_dpbusd_epi32(dot[r][half], word, four(x));
                    if (kind != Q8_0)
                        dot[r][half] = _mm512_dpbusd_epi32(dot[r][half], high_word, four(x + 16));
                }
        }
        __m512 scale = load_f16(scales + PANEL * b);
        for (int r = 0; r < rows; r++) {
            float dx = d[r * n_blocks + b];
            sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(dot[r][0], 8), dot[r][1])), _mm512_mul_ps(scale, splat(dx)), sums[r]);
            if (kind == Q4_1)
                sums[r] += load_f16(scales + PANEL * (n_blocks + b)) * splat(dx * (float)total[r * n_blocks + b]);
        }
    }
    for (int r = 0; r < rows; r++)
        store(out[r], sums[r]);
#else
    memset(out, 0, sizeof(float[NR][PANEL]));
    for (int64_t b = 0; b < n_blocks; b++) {
        int32_t dot[NR][PANEL];
        const uint8_t *block = quants + quant_bytes(kind) * b;
        FETCH_NEXT_PANEL
#if defined(__AVX2__)
        const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
        for (int side = 0; side < 2; side++) { /* rows 0-7, 8-15 */
            __m256i acc[NR][2];
            for (int r = 0; r < rows; r++) {
                acc[r][0] = _mm256_setzero_si256();
                acc[r][1] = _mm256_set1_epi32(kind == Q8_0 ? 0 : -shift * total[r * n_blocks + b]);
            }
            for (int g = 0; g < (kind == Q8_0 ? 8 : 4); g++) {
                __m256i word = _mm256_loadu_si256((const __m256i *)(block + 64 * g + 32 * side));
                if (kind == Q8_0)
                    word = _mm256_xor_si256(word, _mm256_set1_epi8(-128)); /* signed: uint8 x int8 pairs overflow 16 bits */
                for (int r = 0; r < rows; r++)
                    for (int half = 0; half < 2; half++) {
                        const int8_t *x = q + (2 * r + half) * c->n_in + BLOCK * b + 4 * g;
                        __m256i pairs;
                        if (kind == Q8_0) {
                            pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(word), _mm256_sign_epi8(four(x), word));
                        } else {
                            __m256i high = _mm256_and_si256(_mm256_srli_epi16(word, 4), low);
                            pairs = _mm256_maddubs_epi16(_mm256_and_si256(word, low), four(x));
                            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(high, four(x + 16)));
                        }
                        acc[r][half] = _mm256_add_epi32(acc[r][half], _mm256_madd_epi16(pairs, ones));
                    }
            }
            for (int r = 0; r < rows; r++)
                _mm256_storeu_si256((__m256i *)(dot[r] + 8 * side), _mm256_add_epi32(_mm256_slli_epi32(acc[r][0], 8), acc[r][1]));
        }
#else
        for (int r = 0; r < rows; r++) {
            const int8_t *hi = q + 2 * r * c->n_in + BLOCK * b, *lo = hi + c->n_in;
            int32_t x[BLOCK];
            for (int i = 0; i < BLOCK; i++)
                x[i] = 256 * hi[i] + lo[i];
            for (int i = 0; i < PANEL; i++)
                dot[r][i] = -shift * total[r * n_blocks + b];
            for (int g = 0; g < (kind == Q8_0 ? 8 : 4); g++)
                for (int j = 0; j < 4; j++)
                    for (int i = 0; i < PANEL; i++) {
                        uint8_t word = block[64 * g + 4 * i + j];
                        if (kind == Q8_0)
                            dot[r][i] += word * x[4 * g + j];
                        else
                            dot[r][i] += (word & 15) * x[4 * g + j] + (word >> 4) * x[16 + 4 * g + j];
                    }
        }
#endif
        for (int r = 0; r < rows; r++) {
            float dx = d[r * n_blocks + b];
            for (int i = 0; i < PANEL; i += VW) {
                vi whole;
                memcpy(&whole, dot[r] + i, sizeof whole);
                vf grown = load(out[r] + i) + __builtin_convertvector(whole, vf) * (load_f16(scales + PANEL * b + i) * splat(dx));
                if (kind == Q4_1)
                    grown += load_f16(scales + PANEL * (n_blocks + b) + i) * splat(dx * (float)total[r * n_blocks + b]);
                store(out[r] + i, grown);
            }
        }
    }
#endif
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
    switch (w->kind) {
    case F32: FOR_ROWS(floats_panel, F32)
    case F16: FOR_ROWS(floats_panel, F16)
    case BF16: FOR_ROWS(floats_panel, BF16)
    case Q8_0: FOR_ROWS(blocks_panel, Q8_0)
    case Q4_0: FOR_ROWS(blocks_panel, Q4_0)
    default: FOR_ROWS(blocks_panel, Q4_1)
    }
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
        c.d = scratch(SHARED, 0, n_blocks * (4 + 4 + 2 * BLOCK));
        c.total = (const int32_t *)(c.d + n_blocks);
        c.q = (const int8_t *)(c.total + n_blocks);
        if (n * c.n_in > 1 << 14)
            parallel(n, quantise_row, &c);
        else
            for (int64_t row = 0; row < n; row++)
                quantise_row(&c, row, 0);
    }
    parallel(c.n_units, few_rows, &c);
}
