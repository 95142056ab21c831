// Matrices as the kernels read them: (n_out, n_in), a row after another, in chunks of 16 bytes.
//
// WEIGHT is one of the structs below. CHUNK values lie in 16 bytes, and chunk i of the matrix is words[i]. Blocks of 32
// (Q8_0, Q4_0, Q4_1) have their scales apart from their quants, so that every load of quants is 16 bytes and aligned:
// as stored, a block is 34, 18 or 20 bytes. Real16 is the type of the activations that meet them.
#pragma once
#include "common.cuh"

template <class T>
struct Dense {
    typedef T Real16;
    static const int CHUNK = 8;
    static __device__ __forceinline__ void read(const unsigned char* words, const half*, size_t chunk, float (&out)[CHUNK]) {
        load(out, reinterpret_cast<const T*>(words) + chunk * CHUNK);
    }
};
struct F16 : Dense<half> {};
struct BF16 : Dense<bf16> {};

struct Q8_0 {  // value = d * q, q int8; scales: d (n_out, n_in / 32)
    typedef half Real16;
    static const int CHUNK = 16;
    static __device__ __forceinline__ void read(const unsigned char* words, const half* scales, size_t chunk, float (&out)[CHUNK]) {
        uint4 raw = reinterpret_cast<const uint4*>(words)[chunk];
        float d = to_float(scales[chunk / 2]);
        unsigned word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) out[i] = d * (float)((int)(word[i / 4] << (24 - 8 * (i % 4))) >> 24);
    }
};

// Four bits a value: byte i of a block holds value i in its low half and value i + 16 in its high half.
__device__ __forceinline__ void read_nibbles(const unsigned char* words, size_t chunk, float scale, float offset, float (&out)[32]) {
    uint4 raw = reinterpret_cast<const uint4*>(words)[chunk];
    unsigned word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        unsigned byte = word[i / 4] >> (8 * (i % 4));
        out[i] = fmaf(scale, (float)(byte & 15), offset);
        out[i + 16] = fmaf(scale, (float)(byte >> 4 & 15), offset);
    }
}

struct Q4_0 {  // value = d * (q - 8); scales: d (n_out, n_in / 32)
    typedef half Real16;
    static const int CHUNK = 32;
    static __device__ __forceinline__ void read(const unsigned char* words, const half* scales, size_t chunk, float (&out)[CHUNK]) {
        float d = to_float(scales[chunk]);
        read_nibbles(words, chunk, d, -8.f * d, out);
    }
};

struct Q4_1 {  // value = d * q + m; scales: d, m (n_out, n_in / 32, 2)
    typedef half Real16;
    static const int CHUNK = 32;
    static __device__ __forceinline__ void read(const unsigned char* words, const half* scales, size_t chunk, float (&out)[CHUNK]) {
        read_nibbles(words, chunk, to_float(scales[2 * chunk]), to_float(scales[2 * chunk + 1]), out);
    }
};
