/* What a Plan is made of beside keys and values: which rows are the largest, how many and where they are, which is nearest. */
#include "minillm_cpu.h"

#include <float.h>

/* Floats in their order as whole numbers; -0 is 0. */
static inline uint32_t ordered(float x)
{
    uint32_t bits;
    x += 0.0f;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* The number of which `count` of n scores, 1 at least and n at most, are no less: found 11, 22 and 32 bits at a time. *equal: how many
 * of those that equal it are among the count. */
static uint32_t last_of(const float *scores, int64_t n, int64_t count, int64_t *equal)
{
    static const int SHIFTS[] = {21, 10, 0};
    uint32_t last = 0, known = 0; /* its bits, and which of them are known */
    for (int step = 0; step < 3; step++) {
        const int shift = SHIFTS[step];
        const uint32_t buckets = step == 2 ? 1u << 10 : 1u << 11;
        int64_t in[1 << 11] = {0};
        for (int64_t i = 0; i < n; i++) {
            const uint32_t key = ordered(scores[i]);
            if ((key & known) == last)
                in[(key >> shift) & (buckets - 1)]++;
        }
        uint32_t bucket = buckets - 1;
        for (; in[bucket] < count; bucket--)
            count -= in[bucket];
        last |= bucket << shift;
        known |= (buckets - 1) << shift;
    }
    *equal = count;
    return last;
}

/* taken (R,): the counts[s] largest of each of S segments of scores, one after another; of equal ones the earlier. */
EXPORT void minillm_segment_topk(const float *scores, const int64_t *lengths, const int64_t *counts, int64_t n_segments, uint8_t *taken)
{
    for (int64_t s = 0; s < n_segments; scores += lengths[s], taken += lengths[s], s++) {
        const int64_t n = lengths[s];
        if (counts[s] <= 0 || counts[s] >= n) {
            memset(taken, counts[s] > 0, (size_t)n);
            continue;
        }
        int64_t equal;
        const uint32_t last = last_of(scores, n, counts[s], &equal);
        for (int64_t i = 0; i < n; i++) {
            const uint32_t key = ordered(scores[i]);
            taken[i] = key > last || (key == last && equal-- > 0);
        }
    }
}

/* counts (S,): how many are true of each segment of mask. */
EXPORT void minillm_segment_count(const uint8_t *mask, const int64_t *lengths, int64_t n_segments, int64_t *counts)
{
    for (int64_t s = 0; s < n_segments; mask += lengths[s], s++) {
        int64_t count = 0;
        for (int64_t i = 0; i < lengths[s]; i++)
            count += mask[i];
        counts[s] = count;
    }
}

/* rows: where mask (n,) is true; number (n,): which of them each is, or -1. */
EXPORT void minillm_compact(const uint8_t *mask, int64_t n, int64_t *rows, int64_t *number)
{
    int64_t found = 0;
    for (int64_t i = 0; i < n; i++) {
        number[i] = mask[i] ? found : -1;
        if (mask[i])
            rows[found++] = i;
    }
}

/* Row i of a segment [lo, end): the nearest of some rows, given the ones before and after it (none: before < lo, after == end),
 * within `reach` positions, of two as near the earlier; or -1. */
static inline int64_t nearer(const int32_t *pos, int64_t i, int64_t before, int64_t after, int64_t lo, int64_t end, int64_t reach)
{
    const int64_t back = before < lo ? reach + 1 : (int64_t)pos[i] - pos[before];
    const int64_t ahead = after == end ? reach + 1 : (int64_t)pos[after] - pos[i];
    return least(back, ahead) > reach ? -1 : back <= ahead ? before : after;
}

/* near (R,): of the rows of the same segment that stay the nearest to each; of a row that stays, itself. pos ascend in each segment. */
EXPORT void minillm_neighbours(const uint8_t *stays, const int32_t *pos, const int64_t *lengths, int64_t n_segments, int64_t reach, int64_t *near)
{
    for (int64_t s = 0, lo = 0; s < n_segments; lo += lengths[s++]) {
        const int64_t end = lo + lengths[s];
        for (int64_t i = lo, before = lo - 1, after = lo - 1; i < end; i++) {
            if (after < i) /* the next one that stays */
                for (before = after, after = i; after < end && !stays[after]; after++)
                    ;
            near[i] = after == i ? i : nearer(pos, i, before, after, lo, end, reach);
        }
    }
}

static void fold(const Fold *f)
{
    int64_t n_rows = 0, n_entries;
    for (int64_t s = 0; s < f->n_segments; s++)
        n_rows += f->lengths[s];
    minillm_segment_count(f->kept, &n_rows, 1, &n_entries);
    minillm_compact(f->kept, n_rows, f->rows, f->dest);
    memcpy(f->weight, f->size, sizeof(float) * (size_t)n_rows);
    for (int64_t s = 0, lo = 0; s < f->n_segments; lo += f->lengths[s++]) {
        const int64_t end = lo + f->lengths[s];
        for (int64_t i = lo, before = lo - 1, after = lo - 1; i < end; i++) {
            if (after < i)
                for (before = after, after = i; after < end && !(f->kept[after] && !f->protected[after]); after++)
                    ;
            const int64_t to = f->kept[i] ? -1 : nearer(f->pos, i, before, after, lo, end, f->reach);
            if (to < 0)
                continue;
            const float score = f->scores[to], ratio = f->scores[i] / (score > FLT_MIN ? score : FLT_MIN);
            f->dest[i] = f->dest[to];
            f->weight[i] = f->size[i] * (f->counts * (ratio < 0 ? 0 : ratio > 1 ? 1 : ratio));
        }
    }
    double *sums = scratch(SHARED, 0, sizeof(double) * (size_t)n_entries);
    memset(sums, 0, sizeof(double) * (size_t)n_entries);
    for (int64_t i = 0; i < n_rows; i++)
        if (f->dest[i] >= 0)
            sums[f->dest[i]] += f->weight[i];
    for (int64_t e = 0; e < n_entries; e++)
        f->sizes[e] = (float)sums[e];
    for (int64_t i = 0; i < n_rows; i++)
        if (f->dest[i] >= 0)
            f->weight[i] /= f->sizes[f->dest[i]];
}

EXPORT void minillm_fold(const Fold *f) { ATTEMPT(fold(f)); }
