/* The operations that touch every element once: rms_norm, rope, glu, conversions to and from bf16, and the reading of memory
 * that bandwidth is measured with. Each is split over threads where it takes longer than waking them (some 20 us). */
#include "minillm_cpu.h"
#include "rotate.h"

enum { CHUNK = 1 << 14 }; /* elements a task */

typedef struct {
    const float *x, *weight, *up, *cos, *sin;
    float *y;
    int64_t n, positions, dim, rows;
    float eps, linear, cubic;
    int add; /* of rms_norm: onto y */
} Elements;

static int64_t tasks_of(int64_t n, int64_t a_task) { return (n + a_task - 1) / a_task; }

static void norm_rows(void *context, int64_t task, int thread)
{
    (void)thread;
    const Elements *c = context;
    for (int64_t row = task * c->rows; row < least((task + 1) * c->rows, c->n); row++) {
        const float *x = c->x + row * c->dim;
        float *y = c->y + row * c->dim;
        vf squares[2] = {splat(0), splat(0)};
        int64_t i = 0;
        for (; i + 2 * VW <= c->dim; i += 2 * VW)
            for (int j = 0; j < 2; j++)
                squares[j] += load(x + i + j * VW) * load(x + i + j * VW);
        float total = sum(squares[0] + squares[1]);
        for (; i < c->dim; i++)
            total += x[i] * x[i];
        float scale = 1.0f / sqrtf(total / (float)c->dim + c->eps);
        for (i = 0; i + VW <= c->dim; i += VW) {
            const vf normed = load(x + i) * splat(scale) * load(c->weight + i);
            store(y + i, c->add ? load(y + i) + normed : normed);
        }
        for (; i < c->dim; i++)
            y[i] = (c->add ? y[i] : 0) + x[i] * scale * c->weight[i];
    }
}

/* y (n, dim) = x / sqrt(mean(x^2) + eps) * weight; y may be x. */
void FN(rms_norm)(const float *x, const float *weight, float eps, float *y, int64_t n, int64_t dim)
{
    Elements c = {.x = x, .weight = weight, .eps = eps, .y = y, .n = n, .dim = dim, .rows = most(1, CHUNK / dim)};
    parallel(tasks_of(n, c.rows), norm_rows, &c);
}

/* The same, added to y. */
void FN(add_rms_norm)(const float *x, const float *weight, float eps, float *y, int64_t n, int64_t dim)
{
    Elements c = {.x = x, .weight = weight, .eps = eps, .y = y, .n = n, .dim = dim, .rows = most(1, CHUNK / dim), .add = 1};
    parallel(tasks_of(n, c.rows), norm_rows, &c);
}

static void rotate_rows(void *context, int64_t task, int thread)
{
    (void)thread;
    const Elements *c = context;
    const int64_t half = c->dim / 2;
    for (int64_t row = task * c->rows; row < least((task + 1) * c->rows, c->n); row++) {
        const int64_t at = row % c->positions * half;
        rotate(c->x + row * c->dim, c->cos + at, c->sin + at, c->y + row * c->dim, half);
    }
}

/* y (heads, n, d) = the halves of x rotated by cos, sin (n, d / 2); y may be x. */
void FN(rope)(const float *x, const float *cos, const float *sin, float *y, int64_t heads, int64_t n, int64_t head_dim)
{
    Elements c = {.x = x, .cos = cos, .sin = sin, .y = y, .n = heads * n, .positions = n, .dim = head_dim, .rows = most(1, CHUNK / head_dim)};
    parallel(tasks_of(c.n, c.rows), rotate_rows, &c);
}

static void gate_chunk(void *context, int64_t task, int thread)
{
    (void)thread;
    const Elements *c = context;
    int64_t i = task * CHUNK, end = least(i + CHUNK, c->n);
    for (; i + VW <= end; i += VW) {
        vf gate = load(c->y + i);
        store(c->y + i, activated(gate, c->linear, c->cubic) * load(c->up + i));
    }
    for (; i < end; i++) {
        const float gate = c->y[i];
        c->y[i] = gate / (1 + expf(-gate * (c->linear + c->cubic * gate * gate))) * c->up[i];
    }
}

/* gate (n,) = act(gate) * up (simd.h: activated). */
void FN(glu)(float *gate, const float *up, int64_t n, float linear, float cubic)
{
    Elements c = {.y = gate, .up = up, .n = n, .linear = linear, .cubic = cubic};
    parallel(tasks_of(n, CHUNK), gate_chunk, &c);
}

typedef struct {
    const float *x;
    int64_t n;
    int bad[MAX_THREADS];
} Finite;

static void finite_chunk(void *context, int64_t task, int thread)
{
    Finite *c = context;
    int64_t i = task * CHUNK, end = least(i + CHUNK, c->n);
    vf zeros = splat(0); /* NaN from then on where one is not finite */
    for (; i + VW <= end; i += VW)
        zeros += load(c->x + i) * splat(0);
    float zero = sum(zeros);
    for (; i < end; i++)
        zero += c->x[i] * 0.0f;
    c->bad[thread] |= zero != 0.0f;
}

/* Whether all of x (n,) are numbers. */
int FN(finite)(const float *x, int64_t n)
{
    Finite c = {.x = x, .n = n};
    int bad = 0;
    parallel(tasks_of(n, CHUNK), finite_chunk, &c);
    for (int i = 0; i < pool_threads(); i++)
        bad |= c.bad[i];
    return !bad;
}

/* out (n,) = x rounded to bf16. */
void FN(bf16_from)(const float *x, int64_t n, uint16_t *out)
{
    int64_t i = 0;
    for (; i + VW <= n; i += VW)
        store_bf16(out + i, load(x + i));
    for (; i < n; i++)
        out[i] = bf16_of(x[i]);
}

typedef struct {
    const float *x;
    int64_t n;
    double total[MAX_THREADS];
} Stream;

static void read_chunk(void *context, int64_t task, int thread)
{
    Stream *c = context;
    vf totals[4] = {splat(0), splat(0), splat(0), splat(0)};
    int64_t end = least((task + 1) << 18, c->n);
    for (int64_t i = task << 18; i + 4 * VW <= end; i += 4 * VW)
        for (int j = 0; j < 4; j++)
            totals[j] += load(c->x + i + j * VW);
    c->total[thread] += sum(totals[0] + totals[1] + totals[2] + totals[3]);
}

/* The sum of x (n,), a multiple of 4 VW: how fast memory can be read. */
double FN(stream)(const float *x, int64_t n)
{
    Stream c = {.x = x, .n = n};
    parallel(tasks_of(n, 1 << 18), read_chunk, &c);
    double total = 0;
    for (int i = 0; i < MAX_THREADS; i++)
        total += c.total[i];
    return total;
}
