// sums[q,n,chunk] = sum_k (g_n . L_q[:,k]) (R_q[k,:] . (a_n, 1)) for rows n = (b, t).
//
// Two tiles of sums, U = g L and V = (a, 1) R^T, of the same rows and columns (q, k) are filled by
// one stream of stages, multiplied and summed over rank. The rank is a power of two, so a tile
// holds whole queries, or a `chunk` of one. Sums over tokens are `fold_kernel`'s: per token, Q
// numbers beside the O + I that were read.
#pragma once

#include "product.cuh"

namespace ekfac_fast::cuda {

using SmallRows = Tiling<64, 64, 64, 2, 2, 3>;
using WideRows = Tiling<128, 128, 64, 2, 4, 3>;

// Columns (q, k) of L [Q,O,rank], rank a power of two and at least 8.
template <class E>
struct Columns {
  const E* data;
  int64_t L_q, L_o;
  int Q, O, log_rank;

  __device__ void copy(char* to, int o, int c) const {
    const int q = c >> log_rank, k = c & ((1 << log_rank) - 1);
    const bool inside = o < O && q < Q;
    copy_async(to, data + (inside ? q * L_q + o * L_o + k : 0), inside ? 16 : 0);
  }
};

// g [N,O], a [N,I], R [Q rank,J], out [Q,N,chunks]
template <class Tiling, class E>
__global__ void __launch_bounds__(Tiling::threads)
    low_rank_scores_kernel(Matrix<E> g, Matrix<E> a, Columns<E> L, Matrix<E> R, float* out) {
  constexpr int M = Tiling::M, N = Tiling::N, K = Tiling::K, threads = Tiling::threads;
  const Place tile = grouped(blockIdx.x, cdiv(g.rows, M), cdiv(R.rows, N));
  const int n = tile.row * M, c = tile.column * N, deep = cdiv(g.columns, K);
  typename Tiling::Accumulator U = {}, V = {};
  auto load = [&](char* stage, int step) {
    char* right = stage + Tiling::A_bytes;
    if (step < deep) {
      fill<M, K, threads>(stage, g, n, step * K);
      fill<K, N, threads>(right, L, step * K, c);
    } else {
      fill<M, K, threads>(stage, a, n, (step - deep) * K);
      fill<N, K, threads>(right, R, c, (step - deep) * K);
    }
  };
  pipeline<Tiling>(deep + cdiv(R.columns, K), load, [&](const char* stage, int step) {
    if (step < deep)
      multiply<Tiling, E, false, true>(U, stage);
    else
      multiply<Tiling, E, false, false>(V, stage);
  });

  // Eight columns at a time within four lanes, then all of a query's.
  constexpr int eights = N / 8, pitch = eights + 1;
  static_assert(M * pitch * 4 <= Tiling::shared);
  float* sums = reinterpret_cast<float*>(shared_memory());
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Tiling::warp_m / 16; i++) {
#pragma unroll
    for (int j = 0; j < Tiling::warp_n / 8; j++) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        float sum = U[i][j][e] * V[i][j][e] + U[i][j][e + 1] * V[i][j][e + 1];
        sum += from_lane_xor(sum, 1);
        sum += from_lane_xor(sum, 2);
        if (threadIdx.x % 4 == 0) {
          const int at = row_of<Tiling>(i, e) * pitch + column_of<Tiling>(j, 0) / 8;
          store_shared(sums + at, sum);
        }
      }
    }
  }
  __syncthreads();
  const int rank = 1 << L.log_rank, chunks = cdiv(rank, N), terms = min(rank, N) / 8;
  for (int i = threadIdx.x; i < M * (eights / terms); i += threads) {
    const int r = i % M, q = (c >> L.log_rank) + i / M;
    if (n + r >= g.rows || q >= L.Q) continue;
    float sum = 0;
    for (int k = 0; k < terms; k++) {
      sum += load_shared<float>(sums + r * pitch + i / M * terms + k);
    }
    out[(int64_t{q} * g.rows + n + r) * chunks + c / N % chunks] = sum;
  }
}

}  // namespace ekfac_fast::cuda
