// Attention of one token of each of B sequences over its stored entries: split over pages, then combined.
// Defines: real16 = half, bf16; HEAD_DIM = head sizes; FORMAT = page formats
//
//   logit = q.k * scale + log s  (SemantiCache eq. 4) of entries at positions > seen - window (0: no window)
//   out   = softmax(logit) v     zeros where a head stores nothing
//
// Of a format with scales the tensor cores take rows without them: a key's scale meets its dot product, a value's its
// weight.
//
// An item is one KV head of one sequence, item = sequence * H + head. Its G = Hq / H query heads are the rows of one
// tile of 16, so that K and V are read once for all of them (G > 16: gridDim.y tiles). The pages of all items form one
// list of P pages, and warp w of W takes pages [w P / W, (w + 1) P / W): one head may hold everything and its neighbour
// nothing, and every warp still reads as many pages. W: the warps of the grid, or P if there are fewer pages. The grid
// depends on the card alone, and where items begin in the list (`starts`) is computed from the lengths on the device: a
// captured graph stays valid while lengths grow.
//
// What warp w finds for an item goes to row w + item of the partial results: along the list one of the two grows, so no
// row is used twice. A warp fetches the next page into one half of its shared memory while it works on the other; warps
// share nothing.
//
// Entries beyond a head's length, and pages that lie beyond the window as a whole, are not read, whatever is there.
#include "page_formats.cuh"

#define ROWS 16  // query heads in a tile

typedef FORMAT::K K;
typedef FORMAT::V V;

// The list of pages, shared out to warps: each has one at least.
struct Shares {
    int n_pages, n_warps;

    __device__ __forceinline__ Shares(int pages, int warps) : n_pages(pages), n_warps(min(pages, warps)) {}

    __device__ __forceinline__ int first_page(int warp) const { return (int)((long long)n_pages * warp / n_warps); }
    __device__ __forceinline__ int warp_of(int page) const {
        return (int)((((long long)page + 1) * n_warps - 1) / n_pages);
    }
};

// The item that a page belongs to: as many end at or before it.
__device__ __forceinline__ int item_of(int page, const int* starts, int n_items) {
    const int lane = threadIdx.x & 31;
    int item = 0;
    for (int first = 0; first < n_items; first += 32)
        item += __popc(__ballot_sync(FULL_MASK, first + lane < n_items && starts[first + lane + 1] <= page));
    return item;
}

struct Items {
    const unsigned long long* slabs;
    const int *pages, *lengths, *starts, *seen;
    int slab_pages, capacity, n_kv_heads, window;
};

// A page on its way into shared memory.
struct Fetched {
    int item;
    bool visible;  // some entry is
    float bias;    // of entry `lane`: log s, -infinity if it is not visible
    unsigned short k_scale, v_scale;  // and its scales, as they are read: nothing waits for them yet
};

// Begin to fetch a page of the list, which belongs to `item` or a later one, into the tiles k and v.
__device__ __forceinline__ Fetched fetch(const Items& items, int page, int item, K::Word* k, V::Word* v) {
    const int lane = threadIdx.x & 31;
    while (page >= items.starts[item + 1]) ++item;
    const int index = page - items.starts[item], entries = items.lengths[item] - index * PAGE_SIZE;
    const int id = items.pages[(size_t)item * items.capacity + index];
    const auto from = page_at<FORMAT>(items.slabs, items.slab_pages, id);
    bool sees = lane < entries;
    if (sees && items.window) sees = from.pos[lane] > items.seen[item / items.n_kv_heads] - items.window;
    const bool visible = __any_sync(FULL_MASK, sees);
    if (visible) {
        K::fetch(k, from.k, entries, lane);
        V::fetch(v, from.v, entries, lane);
    }
    auto word = [&](const bf16* scales) {
        return K::SCALED && sees ? reinterpret_cast<const unsigned short*>(scales)[lane] : (unsigned short)0;
    };
    return {item, visible, sees ? from.log_size[lane] : NEG_INF, word(from.k_scale), word(from.v_scale)};
}

// q (B, Hq, d); pages (B, H, capacity), lengths (B, H), seen (B): the position of the token; starts: of this layer.
// partial_out (W + items, G, d) and partial_lse (W + items, G), natural log.
// Grid: (any number of blocks, tiles of query heads) x any number of warps, each with 16 rows of q, 2 x 2 x 32 of pages and
// room for 32 of numbers in dynamic shared memory.
extern "C" __global__ void __launch_bounds__(256)
decode_attention(const real16* q, const unsigned long long* slabs, int slab_pages, const int* pages, int capacity,
                 const int* lengths, const int* seen, const int* starts, float* partial_out, float* partial_lse,
                 int n_items, int n_kv_heads, int group, float scale, int window) {
    extern __shared__ __align__(16) unsigned char shared[];
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int warps = blockDim.x / 32, warp = blockIdx.x * warps + threadIdx.x / 32;
    const Shares shares(starts[n_items], gridDim.x * warps);
    if (warp >= shares.n_warps) return;
    const int first = shares.first_page(warp), last = shares.first_page(warp + 1);

    const Items items = {slabs, pages, lengths, starts, seen, slab_pages, capacity, n_kv_heads, window};
    constexpr int Q_BYTES = ROWS * HEAD_DIM * sizeof(real16);
    constexpr int K_BYTES = PAGE_SIZE * K::ROW * sizeof(K::Word), BYTES = K_BYTES + PAGE_SIZE * V::ROW * sizeof(V::Word);
    constexpr int ROOM = K::TURNED ? PAGE_SIZE * HEAD_DIM : 0;  // for a tile of whole numbers
    unsigned char* mine = shared + threadIdx.x / 32 * (Q_BYTES + 2 * BYTES + ROOM);
    real16* q_tile = reinterpret_cast<real16*>(mine);
    int8* room = reinterpret_cast<int8*>(mine + Q_BYTES + 2 * BYTES);
    auto tiles = [&](int page) { return mine + Q_BYTES + ((page - first) & 1) * BYTES; };
    auto k_tile = [&](int page) { return reinterpret_cast<K::Word*>(tiles(page)); };
    auto v_tile = [&](int page) { return reinterpret_cast<V::Word*>(tiles(page) + K_BYTES); };

    const int row0 = blockIdx.y * ROWS;
    Rows<1> rows;
    int item = -1;
    Fetched next = fetch(items, first, item_of(first, starts, n_items), k_tile(first), v_tile(first));
    for (int page = first; page < last; ++page) {
        const Fetched now = next;
        const bool other = now.item != item;
        if (other) {
            item = now.item;
            rows.clear();
            copy_rows<ROWS, 32>(q_tile, q + ((size_t)item * group + row0) * HEAD_DIM, group - row0, lane);
        }
        cp_async_commit();  // this page, and q
        if (page + 1 < last) next = fetch(items, page + 1, item, k_tile(page + 1), v_tile(page + 1));
        cp_async_commit();
        cp_async_wait<1>();
        __syncwarp();
        if (K::TURNED && other) hadamard_tile(q_tile);
        __syncwarp();
        if (now.visible) {
            float s[1][PAGE_SIZE / 8][4], v_scale[PAGE_SIZE / 8][2];
            K::Numbers::dot_products(s, q_tile, K::spread(k_tile(page), room));
            __syncwarp();  // before V is spread
#pragma unroll
            for (int n = 0; n < PAGE_SIZE / 8; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int entry = n * 8 + t * 2 + i;
                    const float bias = __shfl_sync(FULL_MASK, now.bias, entry);
                    float k_scale = scale;
                    v_scale[n][i] = 1.f;
                    if (K::SCALED) {
                        const int scales = __shfl_sync(FULL_MASK, now.v_scale << 16 | now.k_scale, entry);
                        k_scale *= K::Numbers::UNITS * __int_as_float(scales << 16);
                        v_scale[n][i] = V::Numbers::UNITS * __int_as_float(scales & 0xffff0000);
                    }
                    s[0][n][i] = s[0][n][i] * k_scale + bias;
                    s[0][n][2 + i] = s[0][n][2 + i] * k_scale + bias;
                }
            unsigned p[PAGE_SIZE / 16][1][4];
            rows.softmax(s, p, LOG2_E, [&](int n, int i) { return v_scale[n][i]; });
            V::Numbers::accumulate(rows, p, V::spread(v_tile(page), room));
        }
        __syncwarp();  // before the page after the next is fetched into these tiles
        if (page + 1 == last || next.item != item)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = row0 + g + 8 * h;
                float factor, lse;
                rows.finish(0, h, 1.f, factor, lse);
                if (row >= group) continue;
                const size_t to = (size_t)(warp + item) * group + row;
                if (t == 0) partial_lse[to] = lse;
#pragma unroll
                for (int c = 0; c < HEAD_DIM / 8; ++c)
                    *reinterpret_cast<float2*>(partial_out + to * HEAD_DIM + c * 8 + t * 2) =
                        make_float2(rows.o[0][c][2 * h] * factor, rows.o[0][c][2 * h + 1] * factor);
            }
    }
}

// out (B, Hq, d): the partial results of each item, weighted by exp(lse). n_warps: W of decode_attention.
// Grid: (items, G) blocks of COMBINE_WARPS.
#define COMBINE_WARPS 8
extern "C" __global__ void __launch_bounds__(32 * COMBINE_WARPS)
decode_combine(const float* partial_out, const float* partial_lse, const int* starts, real16* out, int n_items,
               int n_warps) {
    __shared__ float sums[COMBINE_WARPS][HEAD_DIM + 1];  // of weighted results, and of weights
    const int item = blockIdx.x, row = blockIdx.y, group = gridDim.y, lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const int begin = starts[item], end = starts[item + 1];
    const Shares shares(starts[n_items], n_warps);
    const int first = begin < end ? shares.warp_of(begin) : 0;
    const int n = begin < end ? shares.warp_of(end - 1) - first + 1 : 0;
    partial_lse += (size_t)(first + item) * group + row;
    partial_out += ((size_t)(first + item) * group + row) * HEAD_DIM;

    float top = NEG_INF;
    for (int i = lane; i < n; i += 32) top = fmaxf(top, partial_lse[(size_t)i * group]);
    top = warp_max(top);
    if (top == NEG_INF) top = 0.f;  // nothing visible: every weight is 0
    constexpr int PARTS = (HEAD_DIM + 31) / 32;  // a lane's features are 32 apart; the last may be none
    float sum[PARTS] = {}, total = 0.f;
#pragma unroll 4
    for (int i = warp; i < n; i += COMBINE_WARPS) {
        const float weight = exp2_approx((partial_lse[(size_t)i * group] - top) * LOG2_E);
        total += weight;
#pragma unroll
        for (int j = 0; j < PARTS; ++j)
            if (j * 32 + lane < HEAD_DIM) sum[j] += weight * partial_out[(size_t)i * group * HEAD_DIM + j * 32 + lane];
    }
#pragma unroll
    for (int j = 0; j < PARTS; ++j)
        if (j * 32 + lane < HEAD_DIM) sums[warp][j * 32 + lane] = sum[j];
    if (lane == 0) sums[warp][HEAD_DIM] = total;
    __syncthreads();
    __shared__ float turned[2][HEAD_DIM];
    for (int c = threadIdx.x; c < HEAD_DIM; c += blockDim.x) {
        float numerator = 0.f, denominator = 0.f;
        for (int i = 0; i < COMBINE_WARPS; ++i) {
            numerator += sums[i][c];
            denominator += sums[i][HEAD_DIM];
        }
        const float x = denominator > 0.f ? numerator / denominator : 0.f;
        turned[0][V::Numbers::feature(c)] = x;
    }
    int now = 0;
    for (int step = 1; V::TURNED && step < BLOCK; step *= 2, now ^= 1) {
        __syncthreads();
        for (int c = threadIdx.x; c < HEAD_DIM; c += blockDim.x)
            turned[now ^ 1][c] = c & step ? turned[now][c - step] - turned[now][c] : turned[now][c] + turned[now][c + step];
    }
    __syncthreads();
    for (int c = threadIdx.x; c < HEAD_DIM; c += blockDim.x) {
        const float norm = V::TURNED ? NORM : 1.f;
        out[((size_t)item * group + row) * HEAD_DIM + c] = from_float<real16>(turned[now][c] * norm);
    }
}
