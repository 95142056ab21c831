// A decode step begins: the page of the newest entry of every head, which may be new, goes into the page tables.
//
// pages (heads, capacity), lengths (heads,) with the new entry counted, last_pages (heads,). Grid: blocks of 256 heads.
#include "pages.cuh"

extern "C" __global__ void __launch_bounds__(256)
last_pages(int* pages, const int* lengths, const int* last_pages, int capacity, int n_heads) {
    int head = blockIdx.x * blockDim.x + threadIdx.x;
    if (head < n_heads) pages[(size_t)head * capacity + (lengths[head] - 1) / PAGE_SIZE] = last_pages[head];
}
