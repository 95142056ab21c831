/* For each row the one of a segment of others whose product with it is the largest.
 *
 * The others are packed once, side by side in panels, so that a step of the product is two loads for a tile of rows; the largest
 * products so far and whose they are go along, and no matrix of products is written. Every product is summed in one order, so that
 * equal rows have equal products wherever they stand, and the first of them is found. */
#include "minillm_cpu.h"
#include "simd.h"

INLINE float dot(const float *a, const float *b, int64_t d)
{
    vf total = splat(0);
    int64_t i = 0;
    for (; i + VW <= d; i += VW)
        total += load(a + i) * load(b + i);
    float result = sum(total);
    for (; i < d; i++)
        result += a[i] * b[i];
    return result;
}

typedef struct {
    const float *keys;
    int64_t n, d;
    float *unit;
} Unit;

enum { ROWS = 256 }; /* a task */

static void some_rows(void *context, int64_t task, int thread)
{
    (void)thread;
    const Unit *c = context;
    for (int64_t r = task * ROWS; r < least((task + 1) * ROWS, c->n); r++) {
        const float *key = c->keys + r * c->d, norm = sqrtf(dot(key, key, c->d));
        for (int64_t i = 0; i < c->d; i++)
            c->unit[r * c->d + i] = norm > 0 ? key[i] / norm : 0;
    }
}

/* unit (n, d) = keys / their norms; a key of norm zero stays zero. */
void FN(unit_rows)(const float *keys, int64_t n, int64_t d, float *unit)
{
    Unit c = {keys, n, d, unit};
    parallel((n + ROWS - 1) / ROWS, some_rows, &c);
}

enum { TILE = VW == 16 ? 12 : 6, COLUMNS = 2 * VW, TILES = 8 }; /* rows whose sums fit the registers; others in a panel; a task */

typedef struct {
    const Nearest *a;
    float *panels; /* (m / COLUMNS, rounded up, d, COLUMNS); zeros after the last of the others */
} Search;

static void pack(void *context, int64_t panel, int thread)
{
    (void)thread;
    const Search *s = context;
    const int64_t d = s->a->d, lo = panel * COLUMNS;
    float *out = s->panels + lo * d;
    for (int64_t i = 0; i < COLUMNS; i++)
        for (int64_t k = 0; k < d; k++)
            out[k * COLUMNS + i] = lo + i < s->a->m ? s->a->others[(lo + i) * d + k] : 0;
}

static void tile(const Search *s, int64_t row, int64_t n, float *left)
{
    const Nearest *a = s->a;
    const int64_t d = a->d, lo = a->first[row], hi = a->last[row + n - 1];
    for (int64_t i = 0; i < TILE; i++)
        for (int64_t k = 0; k < d; k++)
            left[k * TILE + i] = a->rows[(row + least(i, n - 1)) * d + k];
    vf best[TILE];
    vi where[TILE];
    for (int i = 0; i < TILE; i++)
        best[i] = splat(-INFINITY), where[i] = (vi)splat_u((uint32_t)-1);
    for (int64_t panel = lo / COLUMNS; panel * COLUMNS < hi; panel++) {
        const float *right = s->panels + panel * COLUMNS * d;
        vf sums[TILE][2];
        for (int i = 0; i < TILE; i++)
            sums[i][0] = sums[i][1] = splat(0);
        for (int64_t k = 0; k < d; k++) {
            const vf r0 = load(right + k * COLUMNS), r1 = load(right + k * COLUMNS + VW);
            for (int i = 0; i < TILE; i++) {
                sums[i][0] += splat(left[k * TILE + i]) * r0;
                sums[i][1] += splat(left[k * TILE + i]) * r1;
            }
        }
        for (int half = 0; half < 2; half++) {
            vi at;
            for (int j = 0; j < VW; j++)
                at[j] = (int32_t)(panel * COLUMNS) + half * VW + j;
            for (int i = 0; i < TILE; i++) {
                const int64_t r = row + least(i, n - 1);
                const vi seen = (at >= (vi)splat_u((uint32_t)a->first[r])) & (at < (vi)splat_u((uint32_t)a->last[r]));
                const vi better = seen & (sums[i][half] > best[i]);
                best[i] = choose(better, sums[i][half], best[i]);
                where[i] = (where[i] & ~better) | (at & better);
            }
        }
    }
    for (int i = 0; i < n; i++) {
        const float top = largest(best[i]);
        int64_t found = -1;
        for (int j = 0; j < VW; j++)
            if (best[i][j] == top && where[i][j] >= 0 && (found < 0 || where[i][j] < found))
                found = where[i][j];
        a->found[row + i] = found;
        a->product[row + i] = found < 0 ? 0 : top;
    }
}

static void tiles(void *context, int64_t task, int thread)
{
    const Search *s = context;
    float *left = scratch(thread, 0, sizeof(float) * (size_t)(TILE * s->a->d));
    for (int64_t row = task * TILES * TILE; row < least((task + 1) * TILES * TILE, s->a->n); row += TILE)
        tile(s, row, least(TILE, s->a->n - row), left);
}

void FN(nearest)(const Nearest *a)
{
    const int64_t panels = (a->m + COLUMNS - 1) / COLUMNS;
    Search s = {a, scratch(SHARED, 0, sizeof(float) * (size_t)(panels * COLUMNS * a->d))};
    parallel(panels, pack, &s);
    parallel((a->n + TILES * TILE - 1) / (TILES * TILE), tiles, &s);
}
