// Tensor cores and asynchronous copies, in the layouts of the PTX manual. PTX stands in this file and nowhere else;
// where g++ compiles a kernel for the CPU (tests/emulator), cuemu_* do the same with the same fragments.
//
// A warp multiplies A (16, 16) by B (16, 8). With g = lane / 4 and t = lane % 4 a lane holds, two 16-bit values a word,
//   a[0..3]  A[g][2t..], A[g + 8][2t..], A[g][2t + 8..], A[g + 8][2t + 8..]
//   b[0..1]  B[2t..][g], B[2t + 8..][g]
//   c[0..3]  C[g][2t], C[g][2t + 1], C[g + 8][2t], C[g + 8][2t + 1]   (float)
#pragma once
#include "common.cuh"

// c += A B
template <class T>
__device__ __forceinline__ void mma_16816(float (&c)[4], const unsigned (&a)[4], const unsigned* b);

#if defined(__CUDA_ARCH__)
#define DEFINE_MMA(T, NAME)                                                                               \
    template <>                                                                                           \
    __device__ __forceinline__ void mma_16816<T>(float (&c)[4], const unsigned (&a)[4], const unsigned* b) { \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 "                       \
                     "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                              \
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                     \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                 \
    }
DEFINE_MMA(half, "f16")
DEFINE_MMA(bf16, "bf16")
#undef DEFINE_MMA
#else
template <class T>
void mma_16816(float (&c)[4], const unsigned (&a)[4], const unsigned* b) { cuemu_mma_16816<T>(c, a, b); }
#endif

// Four 8 x 8 tiles of 16-bit values from shared memory: lane i gives the address of row i % 8 of tile i / 8, and gets
// elements 2t and 2t + 1 of row g of each tile.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row) {
#if defined(__CUDA_ARCH__)
    unsigned address = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
#else
    cuemu_ldmatrix_x4(r, row, false);
#endif
}

// The same of the transposed tiles: elements 2t and 2t + 1 of column g.
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) {
#if defined(__CUDA_ARCH__)
    unsigned address = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
#else
    cuemu_ldmatrix_x4(r, row, true);
#endif
}

// Begin to copy N bytes (16, past L1; or 4) from global to shared memory; zeros where `there` is false, and `source` is
// not read then.
template <int N>
__device__ __forceinline__ void cp_async(void* target, const void* source, bool there) {
    static_assert(N == 4 || N == 16, "cp_async copies 4 or 16 bytes");
#if defined(__CUDA_ARCH__)
    unsigned address = (unsigned)__cvta_generic_to_shared(target);
    int bytes = there ? N : 0;
    if (N == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     ::"r"(address), "l"(source), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                     ::"r"(address), "l"(source), "r"(bytes) : "memory");
#else
    cuemu_cp_async(target, source, N, there ? N : 0);
#endif
}

// Close a group of copies.
__device__ __forceinline__ void cp_async_commit() {
#if defined(__CUDA_ARCH__)
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    cuemu_cp_async_commit();
#endif
}

// Wait until all groups but the newest N have arrived. Only this thread's copies: a barrier must follow.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
#if defined(__CUDA_ARCH__)
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
    cuemu_cp_async_wait(N);
#endif
}

// Wait until all copies of this thread have arrived. A barrier must follow.
__device__ __forceinline__ void cp_async_wait_all() {
#if defined(__CUDA_ARCH__)
    asm volatile("cp.async.wait_all;" ::: "memory");
#else
    cuemu_cp_async_wait_all();
#endif
}

// 2^x; 0 for -infinity.
__device__ __forceinline__ float exp2_approx(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// (x & AND) | OR in one instruction: of the expression the compiler makes two.
template <unsigned AND, unsigned OR>
__device__ __forceinline__ unsigned and_or(unsigned x) {
#if defined(__CUDA_ARCH__)
    unsigned y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "n"(AND), "n"(OR));
    return y;
#else
    return (x & AND) | OR;
#endif
}

// Two floats, rounded, in one word: `low` in the lower half.
template <class T>
__device__ __forceinline__ unsigned pack(float low, float high);
template <>
__device__ __forceinline__ unsigned pack<half>(float low, float high) {
    __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<unsigned*>(&pair);
}
template <>
__device__ __forceinline__ unsigned pack<bf16>(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<unsigned*>(&pair);
}
