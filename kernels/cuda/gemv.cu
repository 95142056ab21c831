// y = x W^T for the few rows of a decode step: bound by the bytes of W, which are read once.
// Defines: WEIGHT = F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K; ROWS = 1, 2, 4, 8
//
// W (n_out, n_in): words and scales as weights.cuh has them. x (rows, n_in), rows <= ROWS: Real16, or the float32 residual
// stream, which is then normalised on the way (a pass and a launch less). Sums are float32.
// Grid: any number of blocks of 8 warps; a warp takes OUT outputs at a time, its lanes the chunks of their rows, in 16-byte
// loads. Blocks are few and stay (grid-stride), for each of those that normalise does it once for all of its outputs.
#include "weights.cuh"

typedef WEIGHT::Real16 Real16;
static const int OUT = 2;  // outputs of a warp at a time: each load of x serves OUT rows of W

// acc[o][r] = row output[o] of W times row r of x, in every lane. x: shared or global memory, 16-byte aligned rows.
__device__ __forceinline__ void dots(float (&acc)[OUT][ROWS], const int (&output)[OUT], const unsigned char* words,
                                     const half* scales, const Real16* x, int n_in, int rows) {
    int chunks = n_in / WEIGHT::CHUNK;
#pragma unroll
    for (int o = 0; o < OUT; ++o)
#pragma unroll
        for (int r = 0; r < ROWS; ++r) acc[o][r] = 0.f;
    for (int c = threadIdx.x & 31; c < chunks; c += 32) {
        WEIGHT::Raw raw[OUT];
#pragma unroll
        for (int o = 0; o < OUT; ++o) raw[o] = WEIGHT::fetch(words, scales, (size_t)output[o] * chunks + c);
#pragma unroll
        for (int part = 0; part < WEIGHT::CHUNK / 8; ++part) {
            float w[OUT][8];
#pragma unroll
            for (int o = 0; o < OUT; ++o) WEIGHT::decode(raw[o], part, w[o]);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                float a[8];
                load(a, x + (size_t)min(r, rows - 1) * n_in + c * WEIGHT::CHUNK + part * 8);
#pragma unroll
                for (int o = 0; o < OUT; ++o)
#pragma unroll
                    for (int i = 0; i < 8; ++i) acc[o][r] = fmaf(w[o][i], a[i], acc[o][r]);
            }
        }
    }
#pragma unroll
    for (int o = 0; o < OUT; ++o)
#pragma unroll
        for (int r = 0; r < ROWS; ++r) acc[o][r] = warp_sum(acc[o][r]);
}

// out (rows, dim) in shared memory = x / rms(x) * weight
__device__ __forceinline__ void normalise(const float* x, const float* weight, float eps, Real16* out, int dim, int rows) {
    __shared__ float partial[33];
    for (int r = 0; r < rows; ++r) {
        const float* row = x + (size_t)r * dim;
        float sum = 0.f, a[4], w[4];
        for (int i = threadIdx.x * 4; i < dim; i += blockDim.x * 4) {
            load(a, row + i);
            sum += a[0] * a[0] + a[1] * a[1] + a[2] * a[2] + a[3] * a[3];
        }
        float scale = rsqrtf(block_sum(sum, partial) / dim + eps);
        for (int i = threadIdx.x * 4; i < dim; i += blockDim.x * 4) {
            load(a, row + i);
            load(w, weight + i);
#pragma unroll
            for (int j = 0; j < 4; ++j) a[j] *= scale * w[j];
            store(out + (size_t)r * dim + i, a);
        }
    }
    __syncthreads();
}

// y, rows of `width`, = or, where `add`, += x W^T
template <class Y>
__device__ __forceinline__ void multiply(const Real16* x, const unsigned char* words, const half* scales, Y* y, int n_in,
                                         int n_out, int rows, int width, bool add = false) {
    int warp = (blockIdx.x * blockDim.x + threadIdx.x) >> 5, n_warps = gridDim.x * blockDim.x >> 5;
    for (int first = warp * OUT; first < n_out; first += n_warps * OUT) {
        float acc[OUT][ROWS];
        int output[OUT];
#pragma unroll
        for (int o = 0; o < OUT; ++o) output[o] = min(first + o, n_out - 1);
        dots(acc, output, words, scales, x, n_in, rows);
        if ((threadIdx.x & 31) != 0) continue;
#pragma unroll
        for (int o = 0; o < OUT; ++o)
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                if (r >= rows || first + o >= n_out) continue;
                Y* to = y + (size_t)r * width + first + o;
                *to = from_float<Y>(add ? to_float(*to) + acc[o][r] : acc[o][r]);
            }
    }
}

// y (rows, n_out) float32 = or += x W^T: onto the residual stream, or for a norm before it. For 8 rows of 4-bit weights, and for
// 4 of 5-bit ones, 128 registers are not enough.
extern "C" __global__ void __launch_bounds__(256, ROWS >= 4 ? 1 : 2)
gemv(const half* x_words, const unsigned char* words, const half* scales, float* y, int n_in, int n_out, int rows, int add) {
    multiply(reinterpret_cast<const Real16*>(x_words), words, scales, y, n_in, n_out, rows, n_out, add);
}

// y (rows, width) Real16, its columns from `column` on = norm(x) W^T: some of q, k and v
extern "C" __global__ void __launch_bounds__(256, 2)
norm_gemv(const float* x, const float* norm, float eps, const unsigned char* words, const half* scales, half* y_words,
          int n_in, int n_out, int rows, int column, int width) {
    extern __shared__ __align__(16) unsigned char normed[];  // (rows, n_in) Real16
    Real16* h = reinterpret_cast<Real16*>(normed);
    normalise(x, norm, eps, h, n_in, rows);
    multiply(h, words, scales, reinterpret_cast<Real16*>(y_words) + column, n_in, n_out, rows, width);
}

// the same in float32: logits, and predicted scores
extern "C" __global__ void __launch_bounds__(256, 2)
norm_gemv_logits(const float* x, const float* norm, float eps, const unsigned char* words, const half* scales, float* y,
                 int n_in, int n_out, int rows, int column, int width) {
    extern __shared__ __align__(16) unsigned char normed[];
    Real16* h = reinterpret_cast<Real16*>(normed);
    normalise(x, norm, eps, h, n_in, rows);
    multiply(h, words, scales, y + column, n_in, n_out, rows, width);
}

// y (rows, ffn) Real16 = activated(norm(x) Wg^T + bg) * (norm(x) Wu^T + bu); W: Wg above Wu, (2 ffn, n_in); biases (2 ffn,) or null
extern "C" __global__ void __launch_bounds__(256, 2)
norm_gemv_glu(const float* x, const float* norm, float eps, const unsigned char* words, const half* scales,
                 const float* bias, half* y_words, int n_in, int ffn, int rows, float linear, float cubic) {
    extern __shared__ __align__(16) unsigned char normed[];
    Real16* h = reinterpret_cast<Real16*>(normed);
    normalise(x, norm, eps, h, n_in, rows);
    int warp = (blockIdx.x * blockDim.x + threadIdx.x) >> 5, n_warps = gridDim.x * blockDim.x >> 5;
    for (int j = warp; j < ffn; j += n_warps) {
        float acc[OUT][ROWS];
        int output[OUT] = {j, ffn + j};
        dots(acc, output, words, scales, h, n_in, rows);
        if ((threadIdx.x & 31) != 0) continue;
        float of_gate = bias ? bias[j] : 0.f, of_up = bias ? bias[ffn + j] : 0.f;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if (r >= rows) continue;
            float y = activated(acc[0][r] + of_gate, linear, cubic) * (acc[1][r] + of_up);
            reinterpret_cast<Real16*>(y_words)[(size_t)r * ffn + j] = from_float<Real16>(y);
        }
    }
}
