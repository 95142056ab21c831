// Matrices as the kernels read them: (n_out, n_in), a row after another, in chunks of 16 bytes.
//
// WEIGHT is one of the structs below. CHUNK values lie in 16 bytes, and chunk i of the matrix is words[i]: it is fetched at
// once and decoded 8 values at a time. Blocks have their scales apart from their quants, and with them the fifth and sixth
// bits of quants, so that every load of quants is 16 bytes and aligned: as stored, a block is 18 to 210 bytes. Real16 is
// the type of the activations that meet them.
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
    unsigned word[4], high[2];  // high: bits of the quants beyond the fourth
    float scale[2], offset[2];  // of the first half of the chunk and of the second
};
__device__ __forceinline__ Quants quants(const unsigned char* words, size_t chunk, float scale, float offset) {
    uint4 raw = reinterpret_cast<const uint4*>(words)[chunk];
    return {{raw.x, raw.y, raw.z, raw.w}, {0, 0}, {scale, scale}, {offset, offset}};
}

struct Q8_0 {  // value = d * q, q int8; scales of 32 values: d
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
            out[i] = raw.scale[0] * (float)((int)(raw.word[2 * part + i / 4] << shift) >> 24);
        }
    }
};

template <int HIGH>  // bits of a quant beyond the fourth
struct Nibbles {     // byte i of a chunk holds value i in its low half and value i + 16 in its high half
    typedef half Real16;
    typedef Quants Raw;
    static const int CHUNK = 32;
    static __device__ __forceinline__ void decode(const Raw& raw, int part, float (&out)[8]) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            unsigned q = raw.word[2 * (part % 2) + i / 4] >> (8 * (i % 4) + 4 * (part / 2)) & 15;
            int at = HIGH * (8 * part + i);
            q |= (raw.high[at / 32] >> at % 32 & ((1 << HIGH) - 1)) << 4;
            out[i] = fmaf(raw.scale[part / 2], (float)q, raw.offset[part / 2]);
        }
    }
};

struct Q4_0 : Nibbles<0> {  // value = d * (q - 8); scales of 32 values: d
    static __device__ __forceinline__ Raw fetch(const unsigned char* words, const half* scales, size_t chunk) {
        float d = to_float(scales[chunk]);
        return quants(words, chunk, d, -8.f * d);
    }
};

struct Q4_1 : Nibbles<0> {  // value = d * q + m; scales of 32 values: d, m
    static __device__ __forceinline__ Raw fetch(const unsigned char* words, const half* scales, size_t chunk) {
        return quants(words, chunk, to_float(scales[2 * chunk]), to_float(scales[2 * chunk + 1]));
    }
};

struct Q5_0 : Nibbles<1> {  // value = d * (q - 16); scales of 32 values: d, fifth bits in two 16-bit words
    static __device__ __forceinline__ Raw fetch(const unsigned char* words, const half* scales, size_t chunk) {
        float d = to_float(scales[3 * chunk]);
        Raw raw = quants(words, chunk, d, -16.f * d);
        const unsigned short* fifth = reinterpret_cast<const unsigned short*>(scales) + 3 * chunk + 1;
        raw.high[0] = fifth[0] | (unsigned)fifth[1] << 16;
        return raw;
    }
};

struct Q5_1 : Nibbles<1> {  // value = d * q + m; scales of 32 values: d, m, fifth bits
    static __device__ __forceinline__ Raw fetch(const unsigned char* words, const half* scales, size_t chunk) {
        Raw raw = quants(words, chunk, to_float(scales[4 * chunk]), to_float(scales[4 * chunk + 1]));
        raw.high[0] = reinterpret_cast<const unsigned*>(scales)[2 * chunk + 1];
        return raw;
    }
};

// value = d * s * q - dmin * m; scales of 256 values: d, dmin; 8 pairs of bytes s, m; of Q5_K fifth bits of 32 values each
template <int HIGH>
struct OffsetParts : Nibbles<HIGH> {
    static __device__ __forceinline__ Quants fetch(const unsigned char* words, const half* scales, size_t chunk) {
        const half* block = scales + (10 + 16 * HIGH) * (chunk / 8);
        float d[2];
        load(d, block);
        uchar2 part = reinterpret_cast<const uchar2*>(block + 2)[chunk % 8];
        Quants raw = quants(words, chunk, d[0] * (float)part.x, -d[1] * (float)part.y);
        if (HIGH) raw.high[0] = reinterpret_cast<const unsigned*>(block + 10)[chunk % 8];
        return raw;
    }
};
struct Q4_K : OffsetParts<0> {};
struct Q5_K : OffsetParts<1> {};

// value = d * s * (q - 32); scales of 256 values: d as float; 16 int8 s; 8 pairs of words of two high bits of 16 values each
struct Q6_K : Nibbles<2> {
    static __device__ __forceinline__ Raw fetch(const unsigned char* words, const half* scales, size_t chunk) {
        const float* block = reinterpret_cast<const float*>(scales) + 21 * (chunk / 8);
        float s[2];
        load(s, reinterpret_cast<const int8*>(block + 1) + 2 * (chunk % 8));
        Raw raw = quants(words, chunk, 0.f, 0.f);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            raw.scale[half] = block[0] * s[half], raw.offset[half] = -32.f * raw.scale[half];
            raw.high[half] = reinterpret_cast<const unsigned*>(block + 5)[2 * (chunk % 8) + half];
        }
        return raw;
    }
};
