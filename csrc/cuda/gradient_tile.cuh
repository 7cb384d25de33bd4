// G[o,j] = sum_t g[b,t,o] (a[b,t,j], 1): a tile of the per-sequence gradient, and its endings.
//
// Both operands have their rows along the sum, as they lie in memory. An ending finds G in
// registers: G[m][n][e] of a thread is element (row_of(m, e), column_of(n, e)) of the tile, and 0
// outside the layer.
#pragma once

#include "product.cuh"

namespace ekfac_fast::cuda {

// For layers of few tiles; for one tile of sums a thread, two blocks a processor; for two tiles.
using Small = Tiling<64, 64, 32, 2, 2, 4>;
using Wide = Tiling<128, 128, 32, 2, 2, 4>;
using WideTwice = Tiling<128, 128, 32, 2, 4, 4>;

// One layer's operands, rotated: g [B,T,O], a [B,T,I], and a column of ones after a if `ones`.
template <class E>
struct Layer {
  const E *g, *a;
  int64_t g_b, g_t, a_b, a_t;
  int T, O, I;
  bool ones;

  __host__ __device__ int J() const { return I + ones; }
  template <class Tiling>
  __host__ __device__ int tiles() const {
    return cdiv(O, Tiling::M) * cdiv(J(), Tiling::N);
  }
  // First element of tile p.
  template <class Tiling>
  __device__ Place place(int p) const {
    const Place tile = grouped(p, cdiv(O, Tiling::M), cdiv(J(), Tiling::N));
    return {tile.row * Tiling::M, tile.column * Tiling::N};
  }
};

// close(b, G) for each sequence in [b0, b0 + count): one stream of stages, in which the next
// sequence is on its way while one is closed.
template <class Tiling, class E, class Close>
__device__ inline void gradient_tiles(const Layer<E>& x, Place at, int b0, int count,
                                      const Close& close) {
  typename Tiling::Accumulator G = {};
  const int steps = cdiv(x.T, Tiling::K);
  auto load = [&](char* stage, int step) {
    const int64_t b = b0 + step / steps;
    const int t = step % steps * Tiling::K;
    const Matrix<E> g{x.g + b * x.g_b, x.g_t, x.T, x.O, false};
    const Matrix<E> a{x.a + b * x.a_b, x.a_t, x.T, x.I, x.ones};
    fill<Tiling::K, Tiling::M, Tiling::threads>(stage, g, t, at.row);
    fill<Tiling::K, Tiling::N, Tiling::threads>(stage + Tiling::A_bytes, a, t, at.column);
  };
  pipeline<Tiling>(steps * count, load, [&](const char* stage, int step) {
    multiply<Tiling, E, true, true>(G, stage);
    if ((step + 1) % steps) return;
    close(b0 + step / steps, G);
#pragma unroll
    for (auto& row : G) {
#pragma unroll
      for (auto& piece : row) {
#pragma unroll
        for (float& sum : piece) sum = 0;
      }
    }
  });
}

// each(o, j, G[o,j], index of it among the thread's numbers) for what exists of a tile.
template <class Tiling, class E, class Each>
__device__ inline void for_each(const Layer<E>& x, Place at, const typename Tiling::Accumulator& G,
                                const Each& each) {
#pragma unroll
  for (int m = 0; m < Tiling::warp_m / 16; m++) {
#pragma unroll
    for (int n = 0; n < Tiling::warp_n / 8; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int o = at.row + row_of<Tiling>(m, e), j = at.column + column_of<Tiling>(n, e);
        if (o < x.O && j < x.J()) each(o, j, G[m][n][e]);
      }
    }
  }
}

// lam[o,j] = sum_b G_b[o,j]^2 over `per_split` sequences, onto what `out` holds if `add`. The sum
// stays in registers beside G.
template <class Tiling, class E>
__global__ void __launch_bounds__(Tiling::threads)
    eigenvalues_kernel(Layer<E> x, float* out, int B, int per_split, bool add) {
  const int tiles = x.template tiles<Tiling>();
  const Place at = x.template place<Tiling>(blockIdx.x % tiles);
  const int split = blockIdx.x / tiles, b = split * per_split;
  typename Tiling::Accumulator lam = {};
  gradient_tiles<Tiling>(x, at, b, min(B - b, per_split),
                         [&](int, const typename Tiling::Accumulator& G) {
#pragma unroll
                           for (int m = 0; m < Tiling::warp_m / 16; m++) {
#pragma unroll
                             for (int n = 0; n < Tiling::warp_n / 8; n++) {
#pragma unroll
                               for (int e = 0; e < 4; e++) lam[m][n][e] += G[m][n][e] * G[m][n][e];
                             }
                           }
                         });
  out += int64_t{split} * x.O * x.J();
  for_each<Tiling>(x, at, lam, [&](int o, int j, float value) {
    float& to = out[int64_t{o} * x.J() + j];
    to = add ? to + value : value;
  });
}

// ending(tile, at, b, G) for one tile of one sequence. Where they divide by four, four sequences
// run side by side on a tile: what they share, lam or P, comes from memory once for them.
template <class Tiling, class E, class Ending>
__global__ void __launch_bounds__(Tiling::threads) gradient_tile_kernel(Layer<E> x, Ending ending) {
  const int tiles = x.template tiles<Tiling>(), together = gridDim.x / tiles % 4 ? 1 : 4;
  const int tile = blockIdx.x / together % tiles;
  const int sequence = blockIdx.x / (together * tiles) * together + blockIdx.x % together;
  const Place at = x.template place<Tiling>(tile);
  gradient_tiles<Tiling>(x, at, sequence, 1, [&](int b, const typename Tiling::Accumulator& G) {
    ending.template close<Tiling>(x, at, tiles, tile, b, G);
  });
}

// P_b = G_b / (lam + damping): P [B,O,J], lam [O,J]
struct Precondition {
  float* P;
  const float* lam;
  float damping;

  template <class Tiling, class E>
  __device__ void close(const Layer<E>& x, Place at, int, int, int b,
                        const typename Tiling::Accumulator& G) const {
    for_each<Tiling>(x, at, G, [&](int o, int j, float value) {
      const int64_t i = int64_t{o} * x.J() + j;
      P[int64_t{b} * x.O * x.J() + i] = value / (lam[i] + damping);
    });
  }
};

// sums[b,tile,warp] = sum G_b^2 / (lam + damping) over what a warp holds: `fold_kernel` is next.
struct SelfInfluence {
  float* sums;
  const float* lam;
  float damping;

  template <class Tiling, class E>
  __device__ void close(const Layer<E>& x, Place at, int tiles, int tile, int b,
                        const typename Tiling::Accumulator& G) const {
    float sum = 0;
    for_each<Tiling>(x, at, G, [&](int o, int j, float value) {
      sum += value * value / (lam[int64_t{o} * x.J() + j] + damping);
    });
    sum = warp_sum(sum);
    const int64_t to = (int64_t{b} * tiles + tile) * Tiling::warps + threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) sums[to] = sum;
  }
};

// sums[q,b,tile,warp] = sum P_q G_b over what a warp holds: P [Q,O,J]
template <class E>
struct DenseScores {
  float* sums;
  const E* P;
  int64_t P_q, P_o;
  int Q, B;

  template <class Tiling>
  __device__ void close(const Layer<E>& x, Place at, int tiles, int tile, int b,
                        const typename Tiling::Accumulator& G) const {
    for (int q = 0; q < Q; q++) {
      const E* query = P + q * P_q;
      float sum = 0;
      for_each<Tiling>(
          x, at, G, [&](int o, int j, float value) { sum += value * widen(query[o * P_o + j]); });
      sum = warp_sum(sum);
      const int64_t to = ((int64_t{q} * B + b) * tiles + tile) * Tiling::warps + threadIdx.x / 32;
      if (threadIdx.x % 32 == 0) sums[to] = sum;
    }
  }
};

}  // namespace ekfac_fast::cuda
