/* Greedy seed-based clustering (SemantiCache, algorithm 1) of many segments of rows of norm 1, for one tau.
 *
 * The free rows of a segment are a list that only shrinks: each seed is compared with what is left of it. Cosines of segments up
 * to KEPT rows are computed once, when the clustering is made, and serve every tau of the search. */
#include "minillm_cpu.h"

enum { SEGMENTS = 16 }; /* a task */

typedef struct {
    const float *unit;                        /* (R, d) */
    const int64_t *starts, *lengths, *place;  /* (M,) segments; where each one's cosines begin, -1: not kept */
    float *kept;                              /* of each kept segment (length, length), the part above the diagonal */
    int64_t d, n_segments;
} Segments;

typedef struct {
    const Segments *s;
    float tau;
    int64_t *counts;    /* (M,) clusters of each segment */
    int64_t *seed;      /* (R,) or NULL */
    float *similarity;  /* (R,) or NULL */
} Scan;

static void keep(void *context, int64_t task, int thread)
{
    (void)thread;
    const Segments *s = context;
    for (int64_t m = task * SEGMENTS; m < least((task + 1) * SEGMENTS, s->n_segments); m++)
        for (int64_t i = 0; s->place[m] >= 0 && i + 1 < s->lengths[m]; i++)
            kernels->cosines(s->unit, s->d, s->starts[m] + i, s->starts[m] + i + 1, s->starts[m] + s->lengths[m],
                             s->kept + s->place[m] + i * s->lengths[m] + i + 1);
}

static void segment(const Scan *c, int64_t m, int thread)
{
    const Segments *s = c->s;
    const int64_t start = s->starts[m], length = s->lengths[m];
    int64_t *free_rows = scratch(thread, 2, 8 * (size_t)length), n_free = length, count = 0;
    for (int64_t i = 0; i < length; i++)
        free_rows[i] = i;
    while (n_free) {
        const int64_t seed = free_rows[0];
        int64_t left = 0;
        count++;
        for (int64_t j = 1; j < n_free; j++) {
            const int64_t row = free_rows[j];
            float cosine;
            if (s->place[m] >= 0)
                cosine = s->kept[s->place[m] + seed * length + row];
            else
                kernels->cosines(s->unit, s->d, start + seed, start + row, start + row + 1, &cosine);
            if (!(cosine > c->tau))
                free_rows[left++] = row;
            else if (c->seed)
                c->seed[start + row] = start + seed, c->similarity[start + row] = cosine;
        }
        n_free = left;
    }
    c->counts[m] = count;
}

static void scan(void *context, int64_t task, int thread)
{
    const Scan *c = context;
    for (int64_t m = task * SEGMENTS; m < least((task + 1) * SEGMENTS, c->s->n_segments); m++)
        segment(c, m, thread);
}

EXPORT void minillm_unit_rows(const float *keys, int64_t n, int64_t d, float *unit) { kernels->unit_rows(keys, n, d, unit); }

EXPORT void minillm_keep_cosines(const Segments *s) { parallel((s->n_segments + SEGMENTS - 1) / SEGMENTS, keep, (void *)s); }

/* The number of clusters; with seed and similarity (R,), prepared as "every row is its own seed, similarity 1", also whose. */
EXPORT int64_t minillm_clusters(const Segments *s, float tau, int64_t *counts, int64_t *seed, float *similarity)
{
    Scan c = {s, tau, counts, seed, similarity};
    parallel((s->n_segments + SEGMENTS - 1) / SEGMENTS, scan, &c);
    int64_t total = 0;
    for (int64_t m = 0; m < s->n_segments; m++)
        total += counts[m];
    return total;
}
