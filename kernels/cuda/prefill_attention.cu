// Causal attention of n queries of one sequence over its stored entries and over m new tokens, mostly their own
// (FlashAttention-2).
// Defines: real16 = half, bf16; HEAD_DIM = head sizes
//
//   logit = q.k * scale + log s of stored entries; a query at position p sees positions > p - window (0: no window)
//   out   = softmax(logit) v,  lse = natural log of the softmax's denominator; 0 and -inf where nothing is seen
//
// A block takes QUERIES of one query head, a quarter to each of 4 warps, and walks over tiles of 64 keys: first the pages,
// all of which come before the new tokens, then the new keys up to the diagonal. While the warps multiply by K the copy
// of V runs, and while they multiply by V that of the next K: two buffers, 65 KiB with Q at HEAD_DIM 128, so that two
// blocks fit on an SM, in registers too. Blocks with most keys start first; heads that share K and V run side by side
// and meet in the L2 cache.
//
// q (Hq, n, d), k and v (H, m, d); q_pos (n) ascending, or null: the queries are the new tokens', n = m, which are at
// the positions from seen on. pages (1, H, capacity), lengths (1, H), seen (1). out (n, Hq, d), lse (Hq, n).
// Grid: (Hq, ceil(n / QUERIES)) blocks of 4 warps; dynamic shared memory: QUERIES + 2 x 64 rows of HEAD_DIM values, 2 Biases.
// scale > 0.
#include "page_formats.cuh"

#define KEYS 64
#define THREADS 128
#define M (2 * QUERIES / THREADS)  // tiles of 16 queries a warp
#define N (KEYS / 8)
#define INT_MAX 0x7fffffff

struct Bias {
    float log_size[KEYS];
    int pos[KEYS];
};

// The stored entries of one head.
struct Past {
    const unsigned long long* slabs;
    const int* pages;
    int slab_pages, length;

    __device__ __forceinline__ Page<Words> page(int entry) const {
        return page_at<Words>(slabs, slab_pages, pages[entry / PAGE_SIZE]);
    }

    // Begin to fetch K or V of KEYS entries from entry `first` on, the first of a page.
    __device__ __forceinline__ void fetch(int first, bool values, real16* tile) const {
#pragma unroll
        for (int half_tile = 0; half_tile < KEYS; half_tile += PAGE_SIZE) {
            const int left = length - first - half_tile;
            const auto from = page(left > 0 ? first + half_tile : first);
            const real16* rows = values ? from.v : from.k;
            copy_rows<PAGE_SIZE, THREADS>(tile + half_tile * HEAD_DIM, rows, left, threadIdx.x);
        }
    }

    // Begin to fetch their log s and positions.
    __device__ __forceinline__ void fetch(int first, Bias& bias) const {
        const int entry = first + threadIdx.x;
        if (threadIdx.x >= KEYS || entry >= length) return;
        const auto from = page(entry);
        cp_async<4>(&bias.log_size[threadIdx.x], from.log_size + entry % PAGE_SIZE, true);
        cp_async<4>(&bias.pos[threadIdx.x], from.pos + entry % PAGE_SIZE, true);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 2)
prefill_attention(const real16* q, const real16* k, const real16* v, const unsigned long long* slabs, int slab_pages,
                  const int* pages, int capacity, const int* lengths, const int* seen, const int* q_pos, real16* out,
                  float* lse, int n, int m, int group, float scale, int window) {
    extern __shared__ __align__(16) unsigned char shared[];
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int head = blockIdx.x, kv = head / group, row0 = (gridDim.y - 1 - blockIdx.y) * QUERIES;
    const int warp_row = threadIdx.x / 32 * 16 * M;
    const float scale_log2 = scale * LOG2_E, inverse_scale = 1.f / scale;
    real16* q_tile = reinterpret_cast<real16*>(shared);
    real16* k_tile = q_tile + QUERIES * HEAD_DIM;
    real16* v_tile = k_tile + KEYS * HEAD_DIM;
    Bias* bias = reinterpret_cast<Bias*>(v_tile + KEYS * HEAD_DIM);  // [2]
    q += (size_t)head * n * HEAD_DIM;
    k += (size_t)kv * m * HEAD_DIM;
    v += (size_t)kv * m * HEAD_DIM;

    // Where a query stands, counted from the first new token.
    auto place = [&](int row) { return q_pos ? q_pos[min(row, n - 1)] - seen[0] : row; };
    const int first_place = place(row0), visible = min(place(row0 + QUERIES - 1) + 1, m);

    // Tiles 0 .. n_past - 1 are stored entries, the others new keys from tile `first_new` on.
    const bool sees_past = !window || first_place < window;
    const Past past = {slabs, pages + (size_t)kv * capacity, slab_pages, sees_past ? lengths[kv] : 0};
    const int n_past = (past.length + KEYS - 1) / KEYS;
    const int first_new = window ? max(first_place - window + 1, 0) / KEYS : 0;
    const int n_tiles = max(n_past + max((visible + KEYS - 1) / KEYS - first_new, 0), 1);

    auto fetch_new = [&](const real16* rows, int tile, real16* to) {
        const int first = (first_new + tile - n_past) * KEYS;
        copy_rows<KEYS, THREADS>(to, rows + (size_t)first * HEAD_DIM, m - first, threadIdx.x);
    };
    auto fetch_keys = [&](int tile) {
        if (tile < n_past) {
            past.fetch(tile * KEYS, false, k_tile);
            past.fetch(tile * KEYS, bias[tile & 1]);
        } else
            fetch_new(k, tile, k_tile);
    };
    auto fetch_values = [&](int tile) {
        if (tile < n_past)
            past.fetch(tile * KEYS, true, v_tile);
        else
            fetch_new(v, tile, v_tile);
    };

    copy_rows<QUERIES, THREADS>(q_tile, q + (size_t)row0 * HEAD_DIM, n - row0, threadIdx.x);
    fetch_keys(0);
    Rows<M> rows;
    rows.clear();
    for (int tile = 0; tile < n_tiles; ++tile) {
        cp_async_wait_all();
        __syncthreads();  // K is there, and every warp is done with V of the tile before
        fetch_values(tile);
        float s[M][N][4];
        dot_products(s, q_tile + warp_row * HEAD_DIM, k_tile);
        cp_async_wait_all();
        __syncthreads();  // V is there, and every warp is done with K

        // A key is visible from the places first .. last; log s is added in the unit of the dot products.
        const bool stored = tile < n_past;
        const int key0 = (stored ? tile : first_new + tile - n_past) * KEYS;
        if (stored || key0 + KEYS > min(first_place + 1, m) || window) {
            const Bias& b = bias[tile & 1];
            int places[M][2];
#pragma unroll
            for (int i = 0; i < 2 * M; ++i) places[i / 2][i % 2] = place(row0 + warp_row + 8 * i + g);
#pragma unroll
            for (int i = 0; i < KEYS / 4; ++i) {
                const int column = i / 2 * 8 + 2 * t + i % 2, key = key0 + column;
                const int position = stored ? b.pos[column] - seen[0] : key;
                const int first = key >= (stored ? past.length : m) ? INT_MAX : stored ? -INT_MAX : key;
                const int last = window ? position + window - 1 : INT_MAX;
                const float log_size = stored ? b.log_size[column] * inverse_scale : 0.f;
#pragma unroll
                for (int j = 0; j < M; ++j)
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        float& x = s[j][i / 2][2 * h + i % 2];
                        x = first <= places[j][h] && places[j][h] <= last ? x + log_size : NEG_INF;
                    }
            }
        }
        unsigned p[N / 2][M][4];
        rows.softmax(s, p, scale_log2);
        if (tile + 1 < n_tiles) fetch_keys(tile + 1);
        rows.accumulate(p, v_tile);
    }

    // Each warp writes its rows of the result over its rows of Q, which nobody else reads, and stores 16 bytes each.
    real16* mine = q_tile + warp_row * HEAD_DIM;
#pragma unroll
    for (int j = 0; j < M; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = 16 * j + g + 8 * h, query = row0 + warp_row + row;
            float factor, log_sum;
            rows.finish(j, h, scale, factor, log_sum);
            if (t == 0 && query < n) lse[(size_t)head * n + query] = log_sum;
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c)
                reinterpret_cast<unsigned*>(chunk_at(mine, row, c))[t] =
                    pack<real16>(rows.o[j][c][2 * h] * factor, rows.o[j][c][2 * h + 1] * factor);
        }
    __syncwarp();
    for (int i = lane; i < 16 * M * (HEAD_DIM / 8); i += 32) {
        const int row = i / (HEAD_DIM / 8), chunk = i % (HEAD_DIM / 8), query = row0 + warp_row + row;
        if (query < n)
            *reinterpret_cast<uint4*>(out + ((size_t)query * gridDim.x + head) * HEAD_DIM + chunk * 8) =
                *reinterpret_cast<const uint4*>(chunk_at(mine, row, chunk));
    }
}
