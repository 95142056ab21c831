// Matrices as the kernels read them: (n_out, n_in), a row after another, in chunks of 16 bytes.
//
// WEIGHT is one of the structs below. CHUNK values lie in 16 bytes, and chunk i of the matrix is words[i]: it is fetched at
// once and decoded 8 values at a time. Blocks of 32 (Q8_0, Q4_0, Q4_1) have their scales apart from their quants, so that
// every load of quants is 16 bytes and aligned: as stored, a block is 34, 18 or 20 bytes. Real16 is the type of the
// activations that meet them.
#pragma once
#include "common.cuh"

template <class T>
struct Dense {
    typedef T Real16;
    typedef Pack<T, 8> Raw;
    static const int CHUNK = 8;
    static __device__ __forceinline__ Raw fetch(const unsigned char* words, const half*, size_t chunk) {
        return reinterpret_cast<const Raw*>(words)[chunk];
    }
    static __device__ __forceinline__ void decode(const Raw& raw, int, float (&out)[8]) {
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = to_float(raw.v[i]);
    }
};
struct F16 : Dense<half> {};
struct BF16 : Dense<bf16> {};

struct Quants {
    unsigned word[4];
    float scale, offset;
};
__device__ __forceinline__ Quants quants(const unsigned char* words, size_t chunk, float scale, float offset) {
    uint4 raw = reinterpret_cast<const uint4*>(words)[chunk];
    return {{raw.x, raw.y, raw.z, raw.w}, scale, offset};
}

struct Q8_0 {  // value = d * q, q int8; scales: d (n_out, n_in / 32)
    typedef half Real16;
    typedef Quants Raw;
    static const int CHUNK = 16;
    static __device__ __forceinline__ Raw fetch(const unsigned char* words, const half* scales, size_t chunk) {
        return quants(words, chunk, to_float(scales[chunk / 2]), 0.f);
    }
    static __device__ __forceinline__ void decode(const Raw& raw, int part, float (&out)[8]) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            int shift = 24 - 8 * (i % 4);
            out[i] = raw.scale * (float)((int)(raw.word[2 * part + i / 4] << shift) >> 24);
        }
    }
};

struct Nibbles {  // byte i of a block holds value i in its low half and value i + 16 in its high half
    typedef half Real16;
    typedef Quants Raw;
    static const int CHUNK = 32;
    static __device__ __forceinline__ void decode(const Raw& raw, int part, float (&out)[8]) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            unsigned q = raw.word[2 * (part % 2) + i / 4] >> (8 * (i % 4) + 4 * (part / 2)) & 15;
            out[i] = fmaf(raw.scale, (float)q, raw.offset);
        }
    }
};

struct Q4_0 : Nibbles {  // value = d * (q - 8); scales: d (n_out, n_in / 32)
    static __device__ __forceinline__ Raw fetch(const unsigned char* words, const half* scales, size_t chunk) {
        float d = to_float(scales[chunk]);
        return quants(words, chunk, d, -8.f * d);
    }
};

struct Q4_1 : Nibbles {  // value = d * q + m; scales: d, m (n_out, n_in / 32, 2)
    static __device__ __forceinline__ Raw fetch(const unsigned char* words, const half* scales, size_t chunk) {
        return quants(words, chunk, to_float(scales[2 * chunk]), to_float(scales[2 * chunk + 1]));
    }
};
