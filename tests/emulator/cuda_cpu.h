// CUDA C for g++ -std=c++20: qualifiers, vector types, 16-bit floats, intrinsics and atomics, on the fibers of
// scheduler.h. Arithmetic is that of the CPU: __expf is expf, and nothing is said about speed.
#pragma once
#include <cmath>
#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
// The loader rewrites `extern __shared__ T x[];` to CUEMU_DYNAMIC_SHARED(T, x), and `__shared__ T x[N], y;` to
// CUEMU_SHARED(T, x, [N]); CUEMU_SHARED(T, y, );. One block runs at a time, so static storage is shared storage.
#define CUEMU_SHARED(T, name, dimensions)                           \
    static T name##_of_teams[cuemu::TEAMS] dimensions;              \
    cuemu::register_shared(&name##_of_teams, sizeof name##_of_teams); \
    auto& name = name##_of_teams[cuemu::rt.team]
#define CUEMU_DYNAMIC_SHARED(T, name) auto* name = reinterpret_cast<std::remove_cvref_t<T>*>(cuemu::rt.dynamic_shared)

// ---- vector types ---------------------------------------------------------------------------------------------------

#define CUEMU_VECTOR(T, name, align2, align4)                              \
    struct alignas(align2) name##2 { T x, y; };                            \
    struct alignas(align4) name##4 { T x, y, z, w; };                      \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }             \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUEMU_VECTOR(float, float, 8, 16)
CUEMU_VECTOR(int, int, 8, 16)
CUEMU_VECTOR(unsigned, uint, 8, 16)
CUEMU_VECTOR(unsigned char, uchar, 2, 4)

// ---- 16-bit floats --------------------------------------------------------------------------------------------------

struct alignas(2) __half {
    _Float16 value;
    __half() = default;
    __half(float f) : value((_Float16)f) {}
    operator float() const { return (float)value; }
};
using half = __half;
struct alignas(4) __half2 { __half x, y; };
inline float __half2float(__half a) { return a; }
inline __half __float2half(float f) { return f; }
inline __half __float2half_rn(float f) { return f; }
inline float2 __half22float2(__half2 a) { return {a.x, a.y}; }
inline __half2 __floats2half2_rn(float a, float b) { return {a, b}; }
inline __half2 __hsub2(__half2 a, __half2 b) { return {float(a.x) - float(b.x), float(a.y) - float(b.y)}; }

struct alignas(2) __nv_bfloat16 {
    uint16_t word;
    __nv_bfloat16() = default;
    __nv_bfloat16(float f) {  // round to nearest, ties to even
        uint32_t u;
        std::memcpy(&u, &f, 4);
        word = f != f ? 0x7fff : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
    }
    operator float() const {
        uint32_t u = uint32_t(word) << 16;
        float f;
        std::memcpy(&f, &u, 4);
        return f;
    }
};
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
inline float __bfloat162float(__nv_bfloat16 a) { return a; }
inline __nv_bfloat16 __float2bfloat16(float f) { return f; }
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return f; }
inline float2 __bfloat1622float2(__nv_bfloat162 a) { return {a.x, a.y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {a, b}; }
inline __nv_bfloat162 __hsub2(__nv_bfloat162 a, __nv_bfloat162 b) { return {float(a.x) - float(b.x), float(a.y) - float(b.y)}; }

// ---- barriers and warp operations -----------------------------------------------------------------------------------

#define CUEMU_AT cuemu::Place at = cuemu::Place::current()
inline void __syncthreads(CUEMU_AT) { cuemu::block_barrier(at); }
inline void __syncwarp(unsigned mask = ~0u, CUEMU_AT) { cuemu::warp_op(cuemu::SYNCWARP, mask, 0, 0, 32, at); }
#define CUEMU_SHUFFLE(name, op, Arg)                                              \
    template <class T>                                                            \
    T name(unsigned mask, T value, Arg arg, int width = 32, CUEMU_AT) {           \
        return cuemu::warp_op(cuemu::op, mask, value, int(arg), width, at);       \
    }
CUEMU_SHUFFLE(__shfl_sync, INDEX, int)
CUEMU_SHUFFLE(__shfl_xor_sync, XOR, int)
CUEMU_SHUFFLE(__shfl_up_sync, UP, unsigned)
CUEMU_SHUFFLE(__shfl_down_sync, DOWN, unsigned)
inline unsigned __ballot_sync(unsigned mask, int p, CUEMU_AT) {
    return cuemu::warp_op<unsigned>(cuemu::BALLOT, mask, p != 0, 0, 32, at);
}
inline int __any_sync(unsigned mask, int p, CUEMU_AT) { return cuemu::warp_op<int>(cuemu::ANY, mask, p != 0, 0, 32, at); }
inline int __all_sync(unsigned mask, int p, CUEMU_AT) { return cuemu::warp_op<int>(cuemu::ALL, mask, p != 0, 0, 32, at); }
#define CUEMU_REDUCE(name, op)                                                                       \
    template <class T>                                                                               \
    T name(unsigned mask, T value, CUEMU_AT) {                                                       \
        static_assert(std::is_same_v<T, int> || (std::is_same_v<T, unsigned> && cuemu::op == cuemu::ADD)); \
        return cuemu::warp_op(cuemu::op, mask, value, 0, 32, at);                                    \
    }
CUEMU_REDUCE(__reduce_add_sync, ADD)
CUEMU_REDUCE(__reduce_min_sync, MIN)
CUEMU_REDUCE(__reduce_max_sync, MAX)
template <class T>
unsigned __match_any_sync(unsigned mask, T value, CUEMU_AT) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return unsigned(cuemu::warp_op<uint64_t>(cuemu::MATCH, mask, bits, 0, 32, at));
}

// ---- memory ---------------------------------------------------------------------------------------------------------

inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> void __stcs(T* p, T value) { *p = value; }

template <class T, class F>
T cuemu_atomic(T* p, F f) {
#if defined(__SANITIZE_THREAD__)  // it must look atomic
    T before, after;
    __atomic_load(p, &before, __ATOMIC_RELAXED);
    do after = f(before);
    while (!__atomic_compare_exchange(p, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return before;
#else
    T before = *p;
    *p = f(before);
    return before;
#endif
}
#define CUEMU_ATOMIC(name, expression)                                            \
    template <class T>                                                            \
    T name(T* p, std::type_identity_t<T> v) {                                     \
        return cuemu_atomic(p, [&](T old) { return T(expression); });             \
    }
CUEMU_ATOMIC(atomicAdd, old + v)
CUEMU_ATOMIC(atomicMax, old < v ? v : old)
CUEMU_ATOMIC(atomicMin, v < old ? v : old)
CUEMU_ATOMIC(atomicOr, old | v)
CUEMU_ATOMIC(atomicAnd, old & v)
CUEMU_ATOMIC(atomicExch, v)
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
    return cuemu_atomic(p, [&](T old) { return old == expected ? v : old; });
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------

template <class A, class B> auto min(A a, B b) { using T = std::common_type_t<A, B>; return T(b) < T(a) ? T(b) : T(a); }
template <class A, class B> auto max(A a, B b) { using T = std::common_type_t<A, B>; return T(a) < T(b) ? T(b) : T(a); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
template <class To, class From> To cuemu_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline float __int_as_float(int i) { return cuemu_bits<float>(i); }
inline float __uint_as_float(unsigned i) { return cuemu_bits<float>(i); }
inline int __float_as_int(float f) { return cuemu_bits<int>(f); }
inline unsigned __float_as_uint(float f) { return cuemu_bits<unsigned>(f); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {  // of its 4 hex digits 0 to 7 are known here
    uint64_t both = uint64_t(y) << 32 | x;
    unsigned out = 0;
    for (int i = 0; i < 4; ++i) out |= unsigned(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return out;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return (unsigned long long)((unsigned __int128)a * b >> 64); }

#include "tensor_core.h"
