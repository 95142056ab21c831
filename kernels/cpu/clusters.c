/* Greedy seed-based clustering (SemantiCache, algorithm 1) of many segments of rows, for several taus in one reading of the keys.
 *
 * The rows of a segment, of norm 1 and with RoPE undone where that is asked for, lie in memory that stays in a cache. Row by row,
 * those taus under which the row is still free make it a seed: it is compared with the rows after it once for all of them, and
 * under each the similar ones are free no longer. Which rows are free is a bit a row and tau; four rows that are free under no tau
 * are not looked at. */
#include "minillm_cpu.h"
#include "rotate.h"

enum { SEGMENTS = 16 /* a task */, WORD = 16 /* rows */, QUAD = 4 };

typedef struct {
    const Segments *s;
    const float *taus;
    int n_taus;
    int64_t *counts;
    int64_t *seed;
    float *similarity;
} Scan;

/* Key `row` with norm 1 as unit (width,), padded with zeros; a key of norm zero is zeros. */
static void unit_row(const Segments *s, int64_t row, float *unit, int64_t width)
{
    const float *key = s->keys + row * s->d;
    const int64_t half = s->d / 2, at = s->pos ? s->pos[row] * half : 0;
    if (s->pos)
        unrotate(key, s->cos + at, s->sin + at, s->cos, unit, half);
    else
        memcpy(unit, key, sizeof(float) * (size_t)s->d);
    for (int64_t i = s->d; i < width; i++)
        unit[i] = 0;
    vf squares = splat(0);
    for (int64_t i = 0; i < width; i += VW)
        squares += load(unit + i) * load(unit + i);
    const float norm = sqrtf(sum(squares)), inverse = norm > 0 ? 1 / norm : 0;
    for (int64_t i = 0; i < width; i += VW)
        store(unit + i, load(unit + i) * splat(inverse));
}

/* out (QUAD,) = a . b (QUAD, width), at most 1, which the sum of rounded products may exceed. */
INLINE void cosines(const float *a, const float *b, int64_t width, float *out)
{
    vf totals[QUAD] = {splat(0), splat(0), splat(0), splat(0)};
    for (int64_t i = 0; i < width; i += VW)
        for (int j = 0; j < QUAD; j++)
            totals[j] += load(a + i) * load(b + j * width + i);
    sum4(totals, out);
    for (int j = 0; j < QUAD; j++)
        out[j] = fminf(out[j], 1);
}

/* Bit j: cosine j of WORD is greater than tau. */
INLINE uint32_t similar(const float *cosine, float tau)
{
    uint32_t bits = 0;
    for (int j = 0; j < WORD; j += VW)
        bits |= greater(load(cosine + j), splat(tau)) << j;
    return bits;
}

/* Row i of a segment of `words` words becomes a seed under the taus whose bit is set in `seeds`. */
static void absorb(const Scan *c, const int64_t *rows, const float *unit, int64_t width, uint16_t *is_free, int64_t words, int64_t i, uint32_t seeds)
{
    float cosine[WORD] = {0};
    for (int64_t word = i / WORD; word < words; word++) {
        uint32_t any_free = 0;
        for (int t = 0; t < c->n_taus; t++)
            if (seeds >> t & 1)
                any_free |= is_free[t * words + word];
        for (int j = 0; j < WORD; j += QUAD)
            if (any_free >> j & 15)
                cosines(unit + i * width, unit + (word * WORD + j) * width, width, cosine + j);
        for (int t = 0; any_free && t < c->n_taus; t++) {
            if (!(seeds >> t & 1))
                continue;
            uint32_t taken = similar(cosine, c->taus[t]) & is_free[t * words + word];
            is_free[t * words + word] ^= (uint16_t)taken;
            for (; c->seed && taken; taken &= taken - 1) {
                const int j = __builtin_ctz(taken);
                c->seed[rows[word * WORD + j]] = rows[i];
                c->similarity[rows[word * WORD + j]] = cosine[j];
            }
        }
    }
}

static void segment(const Scan *c, int64_t m, int thread, int64_t *counts)
{
    const Segments *s = c->s;
    const int64_t *rows = s->rows + s->starts[m], length = s->lengths[m], words = round_up(length, WORD) / WORD, width = round_up(s->d, VW);
    float *unit = scratch(thread, 2, sizeof(float) * (size_t)(round_up(length, QUAD) * width));
    uint16_t *is_free = scratch(thread, 3, sizeof(uint16_t) * (size_t)(c->n_taus * words));
    for (int64_t i = 0; i < length; i++)
        unit_row(s, rows[i], unit + i * width, width);
    memset(unit + length * width, 0, sizeof(float) * (size_t)((round_up(length, QUAD) - length) * width));
    for (int64_t w = 0; w < c->n_taus * words; w++)
        is_free[w] = (uint16_t)((1u << least(WORD, length - w % words * WORD)) - 1);
    for (int64_t i = 0; i < length; i++) {
        uint32_t seeds = 0;
        for (int t = 0; t < c->n_taus; t++) {
            uint16_t *word = is_free + t * words + i / WORD;
            const uint32_t own = *word >> i % WORD & 1;
            *word ^= (uint16_t)(own << i % WORD);
            seeds |= own << t;
            counts[t] += own;
        }
        if (seeds)
            absorb(c, rows, unit, width, is_free, words, i, seeds);
    }
}

static void some_segments(void *context, int64_t task, int thread)
{
    const Scan *c = context;
    int64_t counts[MAX_TAUS] = {0};
    for (int64_t m = task * SEGMENTS; m < least((task + 1) * SEGMENTS, c->s->n_segments); m++)
        segment(c, m, thread, counts);
    for (int t = 0; t < c->n_taus; t++)
        __atomic_fetch_add(&c->counts[t], counts[t], __ATOMIC_RELAXED);
}

void FN(clusters)(const Segments *s, const float *taus, int n_taus, int64_t *counts, int64_t *seed, float *similarity)
{
    Scan c = {s, taus, n_taus, counts, seed, similarity};
    memset(counts, 0, sizeof(int64_t) * (size_t)n_taus);
    parallel((s->n_segments + SEGMENTS - 1) / SEGMENTS, some_segments, &c);
}
