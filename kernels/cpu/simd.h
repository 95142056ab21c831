/* Vectors of VW floats, as wide as the path's registers, in the vector extension of GCC and Clang: the same text serves SSE, AVX2,
 * AVX-512 and NEON. Only what the extension cannot say is written in intrinsics. */
#ifndef MINILLM_SIMD_H
#define MINILLM_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 16")

#if defined(__AVX512F__)
#define VW 16
#define SPLAT(x) {x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}
#elif defined(__AVX2__)
#define VW 8
#define SPLAT(x) {x, x, x, x, x, x, x, x}
#else
#define VW 4
#define SPLAT(x) {x, x, x, x}
#endif

typedef float vf __attribute__((vector_size(4 * VW)));
typedef int32_t vi __attribute__((vector_size(4 * VW)));
typedef uint32_t vu __attribute__((vector_size(4 * VW)));
typedef uint16_t vh __attribute__((vector_size(2 * VW)));
typedef int8_t vb __attribute__((vector_size(VW)));

INLINE vf splat(float x) { return (vf)SPLAT(x); }
INLINE vu splat_u(uint32_t x) { return (vu)SPLAT(x); }
INLINE vf load(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vu load_u(const void *p) { vu v; memcpy(&v, p, sizeof v); return v; }
INLINE vi load_i(const void *p) { vi v; memcpy(&v, p, sizeof v); return v; }
INLINE vf choose(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }

INLINE vf vmax(vf a, vf b)
{
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#else
    return choose(a > b, a, b);
#endif
}

/* Bit i: a[i] > b[i]. */
INLINE uint32_t greater(vf a, vf b)
{
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
#elif defined(__AVX2__)
    return (uint32_t)_mm256_movemask_ps((__m256)(a > b));
#else
    const vi mask = a > b;
    uint32_t bits = 0;
    for (int i = 0; i < VW; i++)
        bits |= (uint32_t)(mask[i] & 1) << i;
    return bits;
#endif
}

INLINE int any(vi mask)
{
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
    int32_t bits = 0;
    for (int i = 0; i < VW; i++)
        bits |= mask[i];
    return bits != 0;
#endif
}

INLINE float sum(vf v)
{
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(v);
#else
    float s = 0;
    for (int i = 0; i < VW / 2; i++)
        s += v[i] + v[i + VW / 2];
    return s;
#endif
}

/* out = the sums of 4 registers: three instructions a sum, a third of one sum at a time. */
INLINE void sum4(const vf v[4], float *out)
{
#if defined(__AVX512F__)
    __m512 ab = _mm512_unpacklo_ps(v[0], v[1]) + _mm512_unpackhi_ps(v[0], v[1]);
    __m512 cd = _mm512_unpacklo_ps(v[2], v[3]) + _mm512_unpackhi_ps(v[2], v[3]);
    __m512 abcd = (__m512)(_mm512_unpacklo_pd((__m512d)ab, (__m512d)cd)) + (__m512)(_mm512_unpackhi_pd((__m512d)ab, (__m512d)cd));
    __m256 half = _mm512_castps512_ps256(abcd) + _mm512_extractf32x8_ps(abcd, 1);
    _mm_storeu_ps(out, _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#else
    for (int j = 0; j < 4; j++)
        out[j] = sum(v[j]);
#endif
}

INLINE float largest(vf v)
{
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(v);
#else
    float m = v[0];
    for (int i = 1; i < VW; i++)
        m = v[i] > m ? v[i] : m;
    return m;
#endif
}

/* 2^x, relative error 3e-7; 0 for x < -126 (-inf among them), and about 2^127 where it would be more. */
INLINE vf exp2v(vf x)
{
    vi nan = x != x;
    x = choose(x > splat(127.0f), splat(127.0f), x);
#if defined(__AVX512F__)
    vf n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf f = _mm512_sub_ps(_mm512_max_ps(x, splat(-200.0f)), _mm512_max_ps(n, splat(-200.0f)));
#else
    vi gone = x < splat(-126.0f);
    x = choose(gone, splat(-126.0f), x);
    vf shifted = x + splat(12582912.0f); /* 1.5 * 2^23: the sum has the integer in its low bits */
    vf n = shifted - splat(12582912.0f);
    vf f = x - n;
#endif
    vf p = splat(1.3333558e-3f) + f * splat(1.5403530e-4f);
    p = splat(9.6181291e-3f) + f * p;
    p = splat(5.5504109e-2f) + f * p;
    p = splat(2.4022651e-1f) + f * p;
    p = splat(6.9314718e-1f) + f * p;
    p = splat(1.0f) + f * p;
#if defined(__AVX512F__)
    (void)nan; /* scalef keeps it */
    return _mm512_scalef_ps(p, n);
#else
    vi bits = (vi)p + (((vi)shifted - (vi)splat(12582912.0f)) << 23);
    return (vf)((bits & ~gone) | nan);
#endif
}

INLINE vf expv(vf x) { return exp2v(x * splat(1.44269504f)); }

/* g / (1 + exp(-(linear g + cubic g^3))): silu with 1 and 0, gelu by tanh with its two. */
INLINE vf activated(vf g, float linear, float cubic) { return g / (splat(1) + expv(-g * (splat(linear) + splat(cubic) * g * g))); }

INLINE float f16_to_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff, bits;
    float value;
    if (rest < 0x400) { /* zero and subnormals */
        value = (float)rest * 0x1p-24f;
        memcpy(&bits, &value, 4);
    } else {
        bits = (rest >= 0x7c00 ? (rest << 13) + (224u << 23) : (rest << 13) + (112u << 23));
    }
    bits |= sign;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE vf load_f16(const uint16_t *p)
{
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    vf v;
    for (int i = 0; i < VW; i++)
        v[i] = f16_to_float(p[i]);
    return v;
#endif
}

INLINE float bf16_to_float(uint16_t h)
{
    uint32_t bits = (uint32_t)h << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE vf load_bf16(const uint16_t *p)
{
#if defined(__AVX512F__) /* GCC 12 makes six instructions of the conversion below */
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#elif defined(__AVX2__)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#else
    vh h;
    memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}

INLINE vf load_i8(const int8_t *p)
{
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    vb b;
    memcpy(&b, p, sizeof b);
    return __builtin_convertvector(b, vf);
#endif
}

/* float to bf16, to nearest, ties to even; the result in the low halves. Infinity stays; NaN stays NaN. */
INLINE vu bf16_bits(vf x)
{
    vu bits = (vu)x, rounded = (bits + splat_u(0x7fff) + ((bits >> 16) & splat_u(1))) >> 16;
    vu nan = (vu)((bits & splat_u(0x7fffffff)) > splat_u(0x7f800000));
    return (rounded & ~nan) | (splat_u(0x7fc0) & nan);
}

INLINE uint16_t bf16_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE void store_bf16(uint16_t *p, vf x)
{
#if defined(__AVX512BF16__)
    __m256bh h = _mm512_cvtneps_pbh(x);
    memcpy(p, &h, sizeof h);
#else
    vh h = __builtin_convertvector(bf16_bits(x), vh);
    memcpy(p, &h, sizeof h);
#endif
}

#if defined(__AVX512F__)

/* 16 rows of 16 words to 16 columns. */
INLINE void transpose(__m512i r[16])
{
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

#endif

#endif
