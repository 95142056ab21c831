// Tensor-core and asynchronous-copy instructions in the fragment layouts of the PTX manual, for the branches that a
// kernel takes where __CUDA_ARCH__ is not defined. Lanes lend one another pointers to their registers.
#pragma once

struct CuemuLent { const void *a, *b; float* c; };
inline CuemuLent cuemu_lent[cuemu::MAX_THREADS];

// What the 32 lanes of this warp lend, from when all have come until cuemu_give_back.
CUEMU_RUNTIME inline const CuemuLent* cuemu_lend(CuemuLent mine, cuemu::Place at) {
    int me = cuemu::thread_number();
    cuemu_lent[me] = mine;
    cuemu::warp_op(cuemu::SYNCWARP, ~0u, 0, 0, 32, at);
    return &cuemu_lent[me & ~31];
}

CUEMU_RUNTIME inline void cuemu_give_back(cuemu::Place at) { cuemu::warp_op(cuemu::SYNCWARP, ~0u, 0, 0, 32, at); }

// C (16, 8) += A (16, 16) B (16, 8) of a warp's registers, a row of C at once; the sum over k is in its order.
template <class T>  // __half or __nv_bfloat16, two in a register
void cuemu_multiply(const CuemuLent* lent) {
    typedef float Row __attribute__((vector_size(32)));
    float a[16][16];
    Row b[16], c[16];
    auto elements = [](float* to, size_t stride, const void* registers, int i) {
        unsigned pair = ((const unsigned*)registers)[i];
        to[0] = cuemu_bits<T>(uint16_t(pair)), to[stride] = cuemu_bits<T>(uint16_t(pair >> 16));
    };
    for (int lane = 0; lane < 32; ++lane) {
        int group = lane >> 2, column = (lane & 3) * 2;
        for (int i = 0; i < 4; ++i) elements(&a[group + 8 * (i & 1)][column + 8 * (i >> 1)], 1, lent[lane].a, i);
        for (int i = 0; i < 2; ++i) elements((float*)&b[column + 8 * i] + group, 8, lent[lane].b, i);
        for (int i = 0; i < 4; ++i) c[group + 8 * (i >> 1)][column + (i & 1)] = lent[lane].c[i];
    }
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k) c[row] += a[row][k] * b[k];
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) lent[lane].c[i] = c[(lane >> 2) + 8 * (i >> 1)][(lane & 3) * 2 + (i & 1)];
}

// mma.sync.aligned.m16n8k16.row.col.f32.T.T.f32: c[4] += a[4] b[2]. One lane multiplies for all.
template <class T>
void cuemu_mma_16816(float* c, const unsigned* a, const unsigned* b, CUEMU_AT) {
    auto lent = cuemu_lend({a, b, c}, at);
    if (cuemu::thread_number() % 32 == 0) cuemu_multiply<T>(lent);
    cuemu_give_back(at);
}

// ldmatrix.sync.aligned.m8n8.x4[.trans].shared.b16: lane i gives the address of row i % 8 of 8x8 matrix i / 8
inline void cuemu_ldmatrix_x4(unsigned* r, const void* row, bool transposed, CUEMU_AT) {
    if ((uintptr_t)row & 15) cuemu::fail("ldmatrix: the address of a row is not a multiple of 16");
    int lane = cuemu::thread_number() & 31, group = lane >> 2, in_group = lane & 3;
    auto lent = cuemu_lend({row, nullptr, nullptr}, at);
    auto word = [&](int matrix, int of_row, int column) {
        return unsigned(((const uint16_t*)lent[8 * matrix + of_row].a)[column]);
    };
    for (int j = 0; j < 4; ++j)
        r[j] = transposed ? word(j, 2 * in_group, group) | word(j, 2 * in_group + 1, group) << 16
                          : word(j, group, 2 * in_group) | word(j, group, 2 * in_group + 1) << 16;
    cuemu_give_back(at);
}

// cp.async: a copy is performed when its group is waited for, and its target is lost as soon as it begins: a missing wait
// shows as NaN, and so does a target that others still read.
struct CuemuCopy { void* to; const void* from; int n_read, n; long long group; };
constexpr int CUEMU_COPIES = 256;
struct CuemuCopies {
    uint64_t run = 0;  // a thread of another block begins with no copies
    CuemuCopy list[CUEMU_COPIES];
    int n = 0;
    long long group = 0;
};
inline CuemuCopies cuemu_copies[cuemu::MAX_THREADS];

CUEMU_RUNTIME inline CuemuCopies& cuemu_my_copies() {
    CuemuCopies& mine = cuemu_copies[cuemu::thread_number()];
    if (mine.run != cuemu::rt.block_number) mine.run = cuemu::rt.block_number, mine.n = 0, mine.group = 0;
    return mine;
}

inline void cuemu_lose(void* to, int n) { std::memset(to, 0xff, size_t(n)); }  // TSan and ASan see it

// `n_read` bytes are copied, the rest of `n` (4, 8 or 16) becomes zero
CUEMU_RUNTIME inline void cuemu_cp_async(void* to, const void* from, int n, int n_read) {
    CuemuCopies& mine = cuemu_my_copies();
    if (((uintptr_t)to | (uintptr_t)from) % unsigned(n)) cuemu::fail("cp.async: an address is not a multiple of the size");
    if (mine.n == CUEMU_COPIES) return cuemu::fail("cp.async: too many copies in flight in one thread");
    mine.list[mine.n++] = {to, from, n_read, n, mine.group};
    cuemu_lose(to, n);
}

CUEMU_RUNTIME inline void cuemu_cp_async_commit() { ++cuemu_my_copies().group; }

// Wait until at most the `pending` newest committed groups are in flight.
CUEMU_RUNTIME inline void cuemu_cp_async_wait(int pending) {
    CuemuCopies& mine = cuemu_my_copies();
    int left = 0;
    for (int i = 0; i < mine.n; ++i) {
        const CuemuCopy& copy = mine.list[i];
        if (copy.group < mine.group - pending) {
            std::memcpy(copy.to, copy.from, size_t(copy.n_read));
            std::memset((char*)copy.to + copy.n_read, 0, size_t(copy.n - copy.n_read));
        } else {
            mine.list[left++] = copy;
        }
    }
    mine.n = left;
}

CUEMU_RUNTIME inline void cuemu_cp_async_wait_all() {
    cuemu_cp_async_commit();
    cuemu_cp_async_wait(0);
}
