/* The table of one path's kernels. */
#include "mm.h"

void FN(rms_norm)(const float *, const float *, float, float *, int64_t, int64_t);
void FN(rope)(const float *, const float *, const float *, float *, int64_t, int64_t, int64_t);
void FN(add_rms_norm)(const float *, const float *, float, float *, int64_t, int64_t);
void FN(glu)(float *, const float *, int64_t, float, float);
void FN(linear)(const Product *, int, const float *, int64_t, const float *, float);
void FN(mlp)(const Block *, float *, int64_t, float);
int FN(finite)(const float *, int64_t);
void FN(rows)(const Matrix *, const int64_t *, int64_t, float *);
void FN(prefill_attention)(const PrefillAttention *);
void FN(decode_attention)(const DecodeAttention *);
void FN(scores)(const Scores *);
void FN(merge)(const Merge *);
void FN(write_entries)(const Entries *);
void FN(rewrite)(const Rewrite *);
void FN(clusters)(const Segments *, const float *, int, int64_t *, int64_t *, float *);
void FN(unit_rows)(const float *, int64_t, int64_t, float *);
void FN(nearest)(const Nearest *);
void FN(bf16_from)(const float *, int64_t, uint16_t *);
void FN(store_rows)(const float *, int64_t, int64_t, const Paged *, const Slab *, int, int64_t);
double FN(stream)(const float *, int64_t);

#define NAME_(path) #path
#define NAME(path) NAME_(path)

const Kernels FN(kernels) = {
    NAME(MINILLM_PATH), FN(rms_norm), FN(add_rms_norm), FN(rope), FN(glu), FN(linear), FN(mlp), FN(finite), FN(rows), FN(prefill_attention),
    FN(decode_attention), FN(scores), FN(merge), FN(write_entries), FN(rewrite), FN(clusters), FN(unit_rows), FN(nearest), FN(bf16_from), FN(store_rows), FN(stream),
};
