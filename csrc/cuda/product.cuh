// The loop that every kernel here is an ending of: a tile of a product on tensor cores, fp32 sums.
//
//   C[m,n] += sum_k A[m,k] B[k,n]
//
// Tiles of 16-bit operands travel through shared memory in a ring of stages, copied by cp.async
// while earlier ones are multiplied. A tile lies there as it lies in memory, rows of `width`;
// either its rows or its columns run along the sum, and ldmatrix transposes where they have to. The
// 16-byte chunks of a row are permuted by the row's number: the eight rows that one matrix load
// touches are in different banks.
#pragma once

#include "mma.cuh"

namespace ekfac_fast::cuda {

template <class Int>
__host__ __device__ constexpr Int cdiv(Int n, int by) {
  return (n + by - 1) / by;
}

// Sizes of a block's tile: M x N, K terms a stage; WARPS_M x WARPS_N warps share it out.
template <int M_, int N_, int K_, int WARPS_M, int WARPS_N_, int STAGES_>
struct Tiling {
  static constexpr int M = M_, N = N_, K = K_, STAGES = STAGES_, WARPS_N = WARPS_N_;
  static constexpr int warps = WARPS_M * WARPS_N, threads = 32 * warps;
  static constexpr int warp_m = M / WARPS_M, warp_n = N / WARPS_N;
  static constexpr int A_bytes = 2 * M * K, stage = 2 * (M + N) * K, shared = STAGES * stage;
  static_assert(warp_m % 16 == 0 && warp_n % 16 == 0 && K % 16 == 0 && STAGES >= 2);

  // What one thread holds of the tile: 16 x 8 pieces, four numbers of each.
  using Accumulator = float[warp_m / 16][warp_n / 8][4];
};

// Row and column of a tile that a thread's number [m][n][e] belongs to.
template <class Tiling>
__device__ inline int row_of(int m, int e) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  return warp / Tiling::WARPS_N * Tiling::warp_m + 16 * m + lane / 4 + e / 2 * 8;
}
template <class Tiling>
__device__ inline int column_of(int n, int e) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  return warp % Tiling::WARPS_N * Tiling::warp_n + 8 * n + lane % 4 * 2 + e % 2;
}

// A matrix in memory. Rows start at multiples of 16 bytes; what is outside counts as zero, but for
// column `columns` of the existing rows, which is 1 if `ones`: no one ever stores it.
template <class E>
struct Matrix {
  const E* data;
  int64_t pitch;
  int rows, columns;
  bool ones;

  // Eight elements of row r from column c on, a multiple of 8.
  __device__ void copy(char* to, int r, int c) const {
    const int inside = r < rows ? columns - c : -1;
    const E* from = data + (inside > 0 ? r * pitch + c : 0);
    if (ones && 0 <= inside && inside < 8) {
      struct alignas(16) {
        uint16_t bits[8];
      } chunk;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        chunk.bits[i] = i < inside ? from[i].bits : i == inside ? E::one : uint16_t{0};
      }
      store_shared(to, chunk);
    } else {
      copy_async(to, from, inside <= 0 ? 0 : inside < 8 ? 2 * inside : 16);
    }
  }
};

// Byte of a shared tile where a chunk of eight elements lies.
template <int WIDTH>
__host__ __device__ constexpr int chunk_at(int row, int chunk) {
  static_assert(WIDTH % 64 == 0, "eight chunks a row, or rows share banks");
  return (row * (WIDTH / 8) + (chunk ^ (row & 7))) * 16;
}

// Starts copying [ROWS,WIDTH] of x, from (row, column) on, into a shared tile.
template <int ROWS, int WIDTH, int THREADS, class X>
__device__ inline void fill(char* tile, const X& x, int row, int column) {
  constexpr int chunks = WIDTH / 8, step = THREADS / chunks;
  static_assert(THREADS % chunks == 0 && ROWS % step == 0);
  const int r = threadIdx.x / chunks, c = threadIdx.x % chunks;
#pragma unroll
  for (int i = 0; i < ROWS; i += step) {
    x.copy(tile + chunk_at<WIDTH>(r + i, c), row + r + i, column + 8 * c);
  }
}

// The 16 x 16 block of a shared tile from (row, column) on, as four matrices in the order
// (0,0) (8,0) (0,8) (8,8), or (0,0) (0,8) (8,0) (8,8) if ACROSS.
template <int WIDTH, bool TRANSPOSED, bool ACROSS>
__device__ inline void load_block(uint32_t (&x)[4], const char* tile, int row, int column) {
  const int lane = threadIdx.x % 32, second = lane / 8 % 2 * 8, third = lane / 16 * 8;
  const int r = row + lane % 8 + (ACROSS ? third : second);
  const int c = column + (ACROSS ? second : third);
  load_matrices<TRANSPOSED>(x, tile + chunk_at<WIDTH>(r, c / 8));
}

// C += A B for one stage. A_DEEP, B_DEEP: that tile's rows run along the sum.
template <class Tiling, class E, bool A_DEEP, bool B_DEEP>
__device__ inline void multiply(typename Tiling::Accumulator& C, const char* stage) {
  constexpr int MI = Tiling::warp_m / 16, NI = Tiling::warp_n / 8;
  const char *A = stage, *B = stage + Tiling::A_bytes;
  const int warp = threadIdx.x / 32;
  const int m0 = warp / Tiling::WARPS_N * Tiling::warp_m;
  const int n0 = warp % Tiling::WARPS_N * Tiling::warp_n;
#pragma unroll
  for (int k = 0; k < Tiling::K; k += 16) {
    uint32_t a[MI][4], b[NI / 2][4];
#pragma unroll
    for (int m = 0; m < MI; m++) {
      if constexpr (A_DEEP)
        load_block<Tiling::M, true, true>(a[m], A, k, m0 + 16 * m);
      else
        load_block<Tiling::K, false, false>(a[m], A, m0 + 16 * m, k);
    }
#pragma unroll
    for (int n = 0; n < NI / 2; n++) {
      if constexpr (B_DEEP)
        load_block<Tiling::N, true, false>(b[n], B, k, n0 + 16 * n);
      else
        load_block<Tiling::K, false, true>(b[n], B, n0 + 16 * n, k);
    }
#pragma unroll
    for (int m = 0; m < MI; m++) {
#pragma unroll
      for (int n = 0; n < NI; n++) {
        multiply_add(C[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1], E{});
      }
    }
  }
}

// load(stage, step) fills a stage, use(stage, step) multiplies it, for every step in order.
template <class Tiling, class Load, class Use>
__device__ inline void pipeline(int steps, const Load& load, const Use& use) {
  char* shared = shared_memory();
#pragma unroll
  for (int s = 0; s < Tiling::STAGES - 1; s++) {
    if (s < steps) load(shared + s * Tiling::stage, s);
    copy_commit();
  }
  for (int s = 0; s < steps; s++) {
    copy_wait<Tiling::STAGES - 2>();
    __syncthreads();  // step s has arrived, and all warps have left the stage of step s - 1
    const int next = s + Tiling::STAGES - 1;
    if (next < steps) load(shared + next % Tiling::STAGES * Tiling::stage, next);
    copy_commit();
    use(shared + s % Tiling::STAGES * Tiling::stage, s);
  }
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += from_lane_xor(x, mask);
  return x;
}

struct Place {
  int row, column;
};

// Tile p of a rows x columns grid, eight rows at a time so that a wave shares them in L2.
__device__ inline Place grouped(int p, int rows, int columns) {
  const int first = p / (8 * columns) * 8, height = min(rows - first, 8);
  p %= 8 * columns;
  return {first + p % height, p / height};
}

// out[i] += sum of the `terms` numbers of row i: the second stage of a sum over blocks, always in
// the same order. A warp a row.
template <int WARPS>
__global__ void fold_kernel(float* out, const float* parts, int64_t n, int64_t terms) {
  const int64_t i = int64_t{blockIdx.x} * WARPS + threadIdx.x / 32;
  float sum = 0;
  if (i < n) {
    for (int64_t s = threadIdx.x % 32; s < terms; s += 32) sum += parts[i * terms + s];
  }
  sum = warp_sum(sum);
  if (i < n && threadIdx.x % 32 == 0) out[i] += sum;
}

}  // namespace ekfac_fast::cuda
