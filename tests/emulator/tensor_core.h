// Tensor-core and asynchronous-copy instructions in the fragment layouts of the PTX manual, for the branches that a
// kernel takes where __CUDA_ARCH__ is not defined. Lanes lend one another pointers to their registers.
#pragma once

inline const void* cuemu_lent[cuemu::MAX_THREADS][2];

// What the 32 lanes of this warp lend, from when all have come until cuemu_give_back.
CUEMU_RUNTIME inline const void* (*cuemu_lend(const void* a, const void* b, cuemu::Place at))[2] {
    int me = cuemu::thread_number();
    cuemu_lent[me][0] = a, cuemu_lent[me][1] = b;
    cuemu::warp_op(cuemu::SYNCWARP, ~0u, 0, 0, 32, at);
    return &cuemu_lent[me & ~31];
}

CUEMU_RUNTIME inline void cuemu_give_back(cuemu::Place at) { cuemu::warp_op(cuemu::SYNCWARP, ~0u, 0, 0, 32, at); }

template <class T>  // __half or __nv_bfloat16: element i (0, 1) of a register of two
float cuemu_element(unsigned pair, int i) {
    return cuemu_bits<T>(uint16_t(pair >> (16 * i)));
}

// mma.sync.aligned.m16n8k16.row.col.f32.T.T.f32: c[4] += a[4] b[2], a register is two elements of T
template <class T>
void cuemu_mma_16816(float* c, const unsigned* a, const unsigned* b, CUEMU_AT) {
    int lane = cuemu::thread_number() & 31, group = lane >> 2, in_group = lane & 3;
    auto lent = cuemu_lend(a, b, at);
    auto A = [&](int of_lane, int i) { return ((const unsigned*)lent[of_lane][0])[i]; };
    auto B = [&](int of_lane, int i) { return ((const unsigned*)lent[of_lane][1])[i]; };
    for (int j = 0; j < 4; ++j) {
        int row = group + 8 * (j >> 1), col = 2 * in_group + (j & 1);
        float sum = c[j];
        for (int k = 0; k < 16; ++k) {
            unsigned of_a = A((row & 7) * 4 + (k & 7) / 2, (row >> 3) + 2 * (k >> 3));
            unsigned of_b = B(col * 4 + (k & 7) / 2, k >> 3);
            sum += cuemu_element<T>(of_a, k & 1) * cuemu_element<T>(of_b, k & 1);
        }
        c[j] = sum;
    }
    cuemu_give_back(at);
}

// ldmatrix.sync.aligned.m8n8.x4[.trans].shared.b16: lane i gives the address of row i % 8 of 8x8 matrix i / 8
inline void cuemu_ldmatrix_x4(unsigned* r, const void* row, bool transposed, CUEMU_AT) {
    if ((uintptr_t)row & 15) cuemu::fail("ldmatrix: the address of a row is not a multiple of 16");
    int lane = cuemu::thread_number() & 31, group = lane >> 2, in_group = lane & 3;
    auto lent = cuemu_lend(row, nullptr, at);
    auto word = [&](int matrix, int of_row, int column) {
        return unsigned(((const uint16_t*)lent[8 * matrix + of_row][0])[column]);
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
