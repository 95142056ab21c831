/* What the files of kernels/cpu share: the structs that Python fills in, the table of one path's kernels, and the thread pool.
 *
 * Every file that says FN(...) is compiled once for each path of the processor (portable, avx2, avx512, amx) with
 * MINILLM_PATH set; the other files once. Matrices are row-major and float32 unless said. */
#ifndef MINILLM_CPU_H
#define MINILLM_CPU_H

#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define FN(name) JOIN(name, MINILLM_PATH)

#define EXPORT __attribute__((visibility("default")))

/* Those after Q6_K are of files alone: repack.c makes others of them. */
enum Kind { F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q5_K, Q6_K, Q5_0, Q5_1, Q2_K, Q3_K, IQ4_NL, IQ4_XS, MXFP4 };

enum { BLOCK = 32, PANEL = 16 }; /* columns, and rows, of a matrix that are computed together */

/* A weight (n_out, n_in). F32, F16, BF16: row-major, as stored. Blocks: the panels of panels.c. data NULL: no such weight. */
typedef struct {
    int32_t kind, n_out, n_in, unused;
    const void *data;
} Matrix;

/* One of several products of the same x: y (n, n_out), or with a head_dim (n_out / head_dim, n, head_dim), becomes (or, if add, grows
 * by) x W^T + bias. */
typedef struct {
    Matrix w;
    const float *bias; /* (n_out,) or NULL */
    float *y;
    int64_t head_dim, add;
} Product;

/* The weights of one layer, as minillm.architectures.BLOCK has them; NULL: no such vector. */
typedef struct {
    const float *attention_norm, *q_norm, *k_norm; /* the last two: of each head, before RoPE */
    const float *attention_output_norm, *mlp_norm, *mlp_output_norm;
    Matrix wq, wk, wv, wo, w_gate, w_up, w_down;
    const float *bq, *bk, *bv, *bo, *b_gate, *b_up, *b_down;
    Matrix w_score;
    const float *b_score;
    int32_t rope, window; /* which of the tables of cos and sin turns q and k; 0: no sliding window */
    float linear, cubic;  /* the gate becomes g / (1 + exp(-(linear g + cubic g^3))) */
} Block;

typedef struct {
    int32_t n_layers, n_heads, n_kv_heads, head_dim, dim, ffn_dim, vocab_size;
    float eps, scale, embedding_scale; /* scale: of the logits of attention */
    const Block *blocks;
    const float *norm;
    Matrix embedding, head;
} Model;

/* Memory of pages: page p of a slab holds entries p * page_size ... of one KV head. Rows of K and of V are bytes, and have scales in
 * bf16 or NULL: rows.h knows how to read them. */
typedef struct {
    char *rows[2];
    uint16_t *scales[2];
    float *log_size;
    int32_t *pos;
} Slab;

/* One layer of one sequence. Page id = slab * slab_pages + page within the slab. Head h holds lengths[h] entries in the pages
 * pages[h * capacity] ... */
typedef struct {
    const Slab *slabs;
    const int32_t *pages;
    const int64_t *lengths;
    int64_t capacity, seen;
    int32_t slab_pages, page_size, keys, values; /* whose rows are of which RowFormat */
} Paged;

/* n queries of one layer over a past and m new tokens at the positions from past.seen on: q (Hq, n, d), k and v (H, m, d), out (n, Hq d).
 * q_pos (n,): positions of the queries, ascending, or NULL: they are the new tokens'. lse (Hq, n), or NULL: natural log of each query's
 * sum of exponentials; zeros and -inf of a query that sees nothing. */
typedef struct {
    const float *q, *k, *v;
    float *out, *lse;
    const int32_t *q_pos;
    Paged past;
    int32_t n, m, n_heads, n_kv_heads, head_dim, window;
    float scale;
} PrefillAttention;

typedef struct {
    const float *q;     /* (B, Hq, d) */
    float *out;         /* (B, Hq d) */
    const Paged *past;  /* (B,) */
    int32_t batch, n_heads, n_kv_heads, head_dim, window, unused;
    float scale;
} DecodeAttention;

/* Attention scores of the R rows of a layer, KV heads one after another. A query sees rows at positions up to its own (and, with
 * a window, after its own minus the window); only rows at least min_distance positions before it get a score of it. */
enum Reduce { REDUCE_NONE, REDUCE_SUM, REDUCE_MAX };
typedef struct {
    const float *q, *keys, *log_size; /* (Hq, n, d), (R, d), (R,) */
    const int64_t *lengths;           /* (H,) rows of each KV head */
    const int32_t *pos, *q_pos;       /* (R,), (n,) */
    const float *lse;                 /* (Hq, n) natural log of each query's sum of exponentials; NULL: found here */
    float *out;                       /* (G, R); with REDUCE_NONE (G, n, R), zeros */
    int64_t n, n_rows;
    int32_t n_heads, n_kv_heads, head_dim, window, min_distance, reduce;
    float scale;
} Scores;

/* Of n rows, each looks among others[first] .. others[last - 1] for the one with the greatest product; first and last ascend. */
typedef struct {
    const float *rows, *others;   /* (n, d), (m, d) */
    const int64_t *first, *last;  /* (n,) */
    int64_t *found;               /* (n,) the first of the greatest, -1 for none */
    float *product;               /* (n,) 0 for none */
    int64_t n, m, d;
} Nearest;

/* Keys (or values) of a layer, KV heads one after another: of each head what its pages hold after the first start[h] entries, and
 * then n rows of `fresh`. */
typedef struct {
    Paged past;
    const int64_t *start; /* (H,), or NULL: nothing lies in pages */
    const float *fresh;   /* (H, n, d) */
    int64_t n_heads, n, d, values;
} StoredRows;

/* Sums of R rows, out (n_entries, d): out[dest[r]] += weight[r] * rows[r] for dest[r] >= 0. With pos, rows are keys that were rotated
 * there: they are summed with RoPE undone, and the sum is rotated to its entry's position; an entry that is one row of weight 1 at
 * its own position is that row. */
typedef struct {
    StoredRows rows;
    const int64_t *dest;            /* (R,) */
    const float *weight;            /* (R,) */
    float *out;
    const int32_t *pos, *entry_pos; /* (R,), (n_entries,); or NULL: rows are summed as they are */
    const float *cos, *sin;         /* (positions, d / 2) */
    int64_t n_rows, n_entries;
} Merge;

/* Entries of a layer, KV heads one after another, lengths[h] of each: they go into its pages after the first start[h]. */
typedef struct {
    Paged to;
    const float *k, *v, *log_size; /* (E, d), (E, d), (E,) */
    const int32_t *pos;            /* (E,) */
    const int64_t *start, *lengths;
    int64_t n_heads, d;
} Entries;

/* The R entries of some heads after the first start[h] of each become lengths[h] others, E in all: K and V of entry dest[r] the sums of
 * key_weight[r] * K and value_weight[r] * V, for dest[r] >= 0, which is an entry of the same head. No head gets longer. */
typedef struct {
    Paged within;
    const int64_t *start, *lengths, *dest;   /* (H,), (H,), (R,) */
    const float *key_weight, *value_weight;  /* (R,) */
    const float *log_size;                   /* (E,) */
    const int32_t *pos;                      /* (E,) */
    int64_t n_heads, d;
} Rewrite;

/* R rows, S segments of `lengths` one after another, of which those kept become entries and others join the nearest of these that is
 * not protected: see `fold` of minillm/ops/numpy_planning.py. */
typedef struct {
    const float *scores, *size;          /* (R,) */
    const int32_t *pos;                  /* (R,) ascending in each segment */
    const uint8_t *kept, *protected;     /* (R,) */
    const int64_t *lengths;              /* (S,) */
    int64_t *dest;                       /* (R,) */
    float *weight, *sizes;               /* (R,), (E,) */
    int64_t *rows;                       /* (E,) */
    int64_t n_segments, reach;
    float counts;
} Fold;

/* Rows to be clustered: segment m is rows[starts[m]] ... rows[starts[m] + lengths[m] - 1] of the keys. */
enum { MAX_TAUS = 16 };
typedef struct {
    const float *keys;                       /* (R, d) */
    const int64_t *rows, *starts, *lengths;  /* starts, lengths (n_segments,) */
    const int32_t *pos;                      /* (R,) positions whose rotation is undone; NULL: keys as they are */
    const float *cos, *sin;                  /* (positions, d / 2) */
    int64_t d, n_segments;
} Segments;

typedef struct {
    const char *name;
    void (*rms_norm)(const float *x, const float *weight, float eps, float *y, int64_t n, int64_t dim);
    void (*add_rms_norm)(const float *x, const float *weight, float eps, float *y, int64_t n, int64_t dim);
    void (*rope)(const float *x, const float *cos, const float *sin, float *y, int64_t heads, int64_t n, int64_t head_dim);
    void (*glu)(float *gate, const float *up, int64_t n, float linear, float cubic);
    void (*linear)(const Product *products, int count, const float *x, int64_t n, const float *norm, float eps);
    void (*mlp)(const Block *block, float *x, int64_t n, float eps);
    int (*finite)(const float *x, int64_t n);
    void (*rows)(const Matrix *w, const int64_t *ids, int64_t n, float *out);
    void (*prefill_attention)(const PrefillAttention *a);
    void (*decode_attention)(const DecodeAttention *a);
    void (*scores)(const Scores *a);
    void (*merge)(const Merge *m);
    void (*write_entries)(const Entries *e);
    void (*rewrite)(const Rewrite *w);
    /* counts (n_taus,): clusters of all segments together. Of one tau, seed and similarity (R,) or NULL, prepared as "every row is its
     * own seed, similarity 1": whose cluster each row is in, and its cosine with that seed. */
    void (*clusters)(const Segments *s, const float *taus, int n_taus, int64_t *counts, int64_t *seed, float *similarity);
    void (*unit_rows)(const float *keys, int64_t n, int64_t d, float *unit);
    void (*nearest)(const Nearest *a);
    void (*bf16_from)(const float *x, int64_t n, uint16_t *out);
    /* K or V of n entries (n, d), in pages from entry `at` on. */
    void (*store_rows)(const float *rows, int64_t n, int64_t d, const Paged *to, const Slab *slab, int values, int64_t at);
    double (*stream)(const float *x, int64_t n);
} Kernels;

extern const Kernels *kernels; /* the chosen path */

/* Runs task(context, i, thread) for i in 0..n_tasks-1 on the pool's threads and returns when all are done. */
typedef void Task(void *context, int64_t i, int thread);
void parallel(int64_t n_tasks, Task *task, void *context);
int pool_threads(void);

/* At least `bytes` of memory, aligned to 64; the same `slot` of the same thread gives the same memory, which only grows. A thread's
 * own slots are 0..7 (thread as given to a Task); the caller's are SHARED + 0..7. Where the system has no memory left it does not
 * return: the task ends, and the call after its region. So an exported function that comes here runs in an ATTEMPT, of which either
 * all is done or minillm_missing is not 0. */
enum { MAX_THREADS = 256, SLOTS = 8, SHARED = MAX_THREADS };
void *scratch(int thread, int slot, size_t bytes);
extern jmp_buf attempt;
#define ATTEMPT(...)           \
    do {                       \
        if (!_setjmp(attempt)) \
            __VA_ARGS__;       \
    } while (0)

/* Entry i of a head: its slab, and where it is in that. */
static inline int64_t entry_of(const Paged *layer, int64_t head, int64_t i, const Slab **slab)
{
    const int64_t page = layer->pages[head * layer->capacity + i / layer->page_size];
    *slab = &layer->slabs[page / layer->slab_pages];
    return page % layer->slab_pages * layer->page_size + i % layer->page_size;
}

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

#endif
