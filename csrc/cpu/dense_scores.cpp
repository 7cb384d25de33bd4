// s_qb += <P_q, G_b>: a gradient tile meets every query while it is in cache; per token, g P_q meets a.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../check.h"
#include "endings.h"
#include "gemm.h"

namespace ekfac_fast {
namespace {

// s [Q,B]. Four gradient tiles and four query tiles at a time: sixteen dot products from eight streams.
template <class Acc>
void by_sequence(at::Tensor& s, const at::Tensor& P, const at::Tensor& g, const at::Tensor& a,
                 bool bias, const Letters& size) {
  const Panels A = pack_rows(g.mT()), B = pack_columns(a, bias);
  const int64_t tiles = A.count * B.count, area = A.width * B.width;
  const int64_t groups = ceil_div(size.B, 4), queries = round_up(size.Q, 4);
  // Partial sums of one block of tiles a row; blocks depend on the shape alone, so results repeat.
  const int64_t blocks = std::min<int64_t>(tiles, 64), a_block = ceil_div(tiles, blocks);
  at::Tensor partial = at::zeros({blocks, groups, queries, 4}, at::dtype(s.scalar_type()));
  Acc* sums = partial.mutable_data_ptr<Acc>();
  const at::Tensor rows = P.stride(2) == 1 ? P : P.contiguous();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    Tile<Acc> G(4 * area), P_tile(queries * area);
    const Acc *x[4], *y[4];
    for (int64_t block = begin; block < end; block++) {
      for (int64_t tile = block * a_block; tile < std::min(tiles, (block + 1) * a_block); tile++) {
        const int64_t i = tile / B.count, j = tile % B.count;
        const int64_t m = A.size(i), n = B.size(j), used = m * B.width;
        std::fill_n(P_tile.data, queries * used, Acc(0));
        for (int64_t q = 0; q < size.Q; q++) {
          for (int64_t r = 0; r < m; r++) {
            const int64_t at = q * rows.stride(0) + (A.begin(i) + r) * rows.stride(1) + B.begin(j);
            Acc* to = P_tile.data + q * used + r * B.width;
            switch (rows.scalar_type()) {
              case at::kDouble:
                if constexpr (std::is_same_v<Acc, double>) convert(to, rows.const_data_ptr<double>() + at, n);
                break;
              case at::kBFloat16:
                if constexpr (std::is_same_v<Acc, float>) convert(to, rows.const_data_ptr<at::BFloat16>() + at, n);
                break;
              case at::kHalf:
                if constexpr (std::is_same_v<Acc, float>) convert(to, rows.const_data_ptr<at::Half>() + at, n);
                break;
              default:
                if constexpr (std::is_same_v<Acc, float>) convert(to, rows.const_data_ptr<float>() + at, n);
            }
          }
        }
        for (int64_t group = 0; group < groups; group++) {
          for (int64_t k = 0; k < 4; k++) {
            // The last group repeats a sequence; its surplus columns are dropped below.
            const int64_t b = std::min(4 * group + k, size.B - 1);
            multiply<Acc>(A, b, i, B, b, j, G.data + k * area);
            y[k] = G.data + k * area;
          }
          for (int64_t q = 0; q < queries; q += 4) {
            for (int64_t k = 0; k < 4; k++) x[k] = P_tile.data + (q + k) * used;
            dot_4x4(sums + ((block * groups + group) * queries + q) * 4, x, y, used);
          }
        }
      }
    }
    release(A);
  });
  const at::Tensor total = partial.sum(0).transpose(0, 1).reshape({queries, 4 * groups});
  s.add_(total.narrow(0, 0, size.Q).narrow(1, 0, size.B));
}

// s [Q,B,T]: row n of g P_q, dotted with row n of (a, 1).
template <class Acc>
void by_token(at::Tensor& s, const at::Tensor& P, const at::Tensor& g, const at::Tensor& a, bool bias,
              const Letters& size) {
  const int64_t N = size.B * size.T;
  const at::Tensor inputs = a.reshape({N, size.I}).to(s.scalar_type()).contiguous();
  const Panels A = pack_rows(g.reshape({1, N, size.O})), B = pack_columns(P);
  at::Tensor total = at::zeros({size.Q, N}, at::dtype(s.scalar_type()));
  Acc* sums = total.mutable_data_ptr<Acc>();
  const Acc* data = inputs.const_data_ptr<Acc>();
  at::parallel_for(0, size.Q * A.count, 1, [&](int64_t begin, int64_t end) {
    Tile<Acc> C(A.width * B.width);
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t q = unit / A.count, i = unit % A.count;
      for (int64_t j = 0; j < B.count; j++) {
        multiply<Acc>(A, 0, i, B, q, j, C.data);
        const int64_t n = std::min(B.size(j), size.I - B.begin(j));
        for (int64_t r = 0; r < A.size(i); r++) {
          const Acc* row = C.data + r * B.width;
          Acc& sum = sums[q * N + A.begin(i) + r];
          if (n > 0) sum += dot(row, data + (A.begin(i) + r) * size.I + B.begin(j), n);
          if (bias && j == B.count - 1) sum += row[B.size(j) - 1];
        }
      }
    }
    release(A);
  });
  s.add_(total.view({size.Q, size.B, size.T}));
}

void dense_scores(at::Tensor& s, const at::Tensor& P, const at::Tensor& g, const at::Tensor& a,
                  bool bias) {
  const Letters size =
      check("dense_scores", "s[Q,B]|[Q,B,T] P[Q,O,J] g[B,T,O] a[B,T,I]", {s, P, g, a}, bias);
  if (s.numel() == 0 || P.numel() == 0) return;
  auto run = [&]<class Acc>(Acc) {
    s.dim() == 2 ? by_sequence<Acc>(s, P, g, a, bias, size) : by_token<Acc>(s, P, g, a, bias, size);
  };
  g.scalar_type() == at::kDouble ? run(double{}) : run(float{});
}

}  // namespace
}  // namespace ekfac_fast

TORCH_LIBRARY_IMPL(ekfac_fast, CPU, m) { m.impl("dense_scores", &ekfac_fast::dense_scores); }
