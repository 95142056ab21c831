// A decode step begins: where the pages of each item of decode_attention.cu begin in the list of all.
//
// starts (layers, items + 1): pages of all items before, from lengths (layers, items).
// Grid: (layers) warps.
#include "pages.cuh"

extern "C" __global__ void __launch_bounds__(32)
decode_plan(const int* lengths, int* starts, int n_items) {
    const int lane = threadIdx.x;
    lengths += (size_t)blockIdx.x * n_items;
    starts += (size_t)blockIdx.x * (n_items + 1);
    int before = 0;
    if (lane == 0) starts[0] = 0;
    for (int first = 0; first < n_items; first += 32) {
        const int item = first + lane;
        int pages = item < n_items ? (lengths[item] + PAGE_SIZE - 1) / PAGE_SIZE : 0;
        for (int step = 1; step < 32; step *= 2) {
            const int left = __shfl_up_sync(FULL_MASK, pages, step);
            if (lane >= step) pages += left;
        }
        if (item < n_items) starts[item + 1] = before + pages;
        before += __shfl_sync(FULL_MASK, pages, 31);
    }
}
