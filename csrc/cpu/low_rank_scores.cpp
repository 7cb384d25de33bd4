// s_qb += sum_tk (g_bt . L_q[:,k]) (R_q[k,:] . (a_bt, 1)): two products over the same rows and
// columns, one tile of each at a time, multiplied and summed before the next.
//
// A column panel holds whole queries (128 / K of them): a query's sum closes inside the panel.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../check.h"
#include "endings.h"
#include "gemm.h"

namespace ekfac_fast {
namespace {

// Factors of `group` queries a panel; which dimensions of x are summed and which is the rank.
Panels pack_factors(const at::Tensor& x, int64_t depth_dim, int64_t rank_dim, int64_t depth,
                    int64_t group) {
  const int64_t Q = x.size(0), K = x.size(rank_dim);
  Panels panels(true, 1, ceil_div(Q, group) * round_up(group * K, kLanes), depth,
                compute_dtype(x.scalar_type()), round_up(group * K, kLanes));
  at::parallel_for(0, Q, 1, [&](int64_t begin, int64_t end) {
    for (int64_t q = begin; q < end; q++) {
      const int64_t p = q / group, to = q % group * K;
      const bool last = q == Q - 1 || to + K == group * K;
      for (int64_t k = 0; k < panels.padded_depth; k += kBlock) {
        panels.fill(0, p, to, K, Matrix(x, rank_dim, depth_dim, q, 0), false, last, nullptr, k,
                    std::min(k + kBlock, panels.padded_depth));
      }
    }
  });
  return panels;
}

template <class Acc>
void accumulate(at::Tensor s, const at::Tensor& L, const at::Tensor& R, const at::Tensor& g,
                const at::Tensor& a, bool bias, const Letters& size) {
  const int64_t K = size.K, group = std::max<int64_t>(1, kTile / K);
  const Panels G = pack_rows(g), A = pack_rows(a);
  const Panels left = pack_factors(L, 1, 2, size.O, group),
               right = pack_factors(R, 2, 1, size.I, group);
  const int64_t width = left.width, per_token = s.dim() == 3;
  // The constant 1 of a bias meets column J of R: the same addend for every row.
  at::Tensor ones = at::zeros({left.count, width}, at::dtype(s.scalar_type()));
  if (bias) {
    const at::Tensor last = R.select(2, size.I).to(s.scalar_type());
    for (int64_t p = 0; p < left.count; p++) {
      const int64_t n = std::min(group, size.Q - p * group);
      ones[p].narrow(0, 0, n * K).copy_(last.narrow(0, p * group, n).reshape(-1));
    }
  }
  at::Tensor total = per_token ? at::zeros({size.Q, size.B, size.T}, s.options())
                               : at::zeros({G.count, size.Q, size.B}, s.options());
  const Acc* addend = ones.const_data_ptr<Acc>();
  Acc* sums = total.mutable_data_ptr<Acc>();
  // Column panels innermost: factors stay in the last-level cache while rows stream past.
  at::parallel_for(0, size.B * G.count * left.count, 1, [&](int64_t begin, int64_t end) {
    Tile<Acc> U(G.width * width), V(G.width * width), column(width);
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t p = unit % left.count, row = unit / left.count;
      const int64_t b = row / G.count, i = row % G.count;
      const int64_t queries = std::min(group, size.Q - p * group);
      multiply<Acc>(G, b, i, left, 0, p, U.data);
      multiply<Acc>(A, b, i, right, 0, p, V.data);
      if (per_token) {
        for (int64_t r = 0; r < G.size(i); r++) {
          std::fill_n(column.data, width, Acc(0));
          add_products(column.data, U.data + r * width, V.data + r * width, addend + p * width,
                       width);
          for (int64_t q = 0; q < queries; q++) {
            Acc sum = 0;
            for (int64_t k = 0; k < K; k++) sum += column.data[q * K + k];
            sums[((p * group + q) * size.B + b) * size.T + G.begin(i) + r] = sum;
          }
        }
        continue;
      }
      std::fill_n(column.data, width, Acc(0));
      for (int64_t r = 0; r < G.size(i); r++) {
        add_products(column.data, U.data + r * width, V.data + r * width, addend + p * width,
                     width);
      }
      for (int64_t q = 0; q < queries; q++) {
        Acc sum = 0;
        for (int64_t k = 0; k < K; k++) sum += column.data[q * K + k];
        sums[(i * size.Q + p * group + q) * size.B + b] = sum;
      }
    }
    release(G);
  });
  s.add_(per_token ? total : total.sum(0));
}

void low_rank_scores(at::Tensor& s, const at::Tensor& L, const at::Tensor& R, const at::Tensor& g,
                     const at::Tensor& a, bool bias) {
  const Letters size =
      check("low_rank_scores", "s[Q,B]|[Q,B,T] L[Q,O,K] R[Q,K,J] g[B,T,O] a[B,T,I]",
            {s, L, R, g, a}, bias);
  if (s.numel() == 0 || size.K == 0 || size.T == 0) return;
  // A slab of queries against a slab of sequences at a time.
  const int64_t group = std::max<int64_t>(1, kTile / size.K);
  const int64_t queries = round_up(ceil_div(slab_lines(std::max(size.O, size.I)), size.K), group);
  const int64_t sequences = ceil_div(slab_lines(std::max(size.O, size.I)), size.T);
  for (int64_t q = 0; q < size.Q; q += queries) {
    Letters part = size;
    part.Q = std::min(queries, size.Q - q);
    const at::Tensor L_q = L.narrow(0, q, part.Q), R_q = R.narrow(0, q, part.Q);
    for (int64_t b = 0; b < size.B; b += sequences) {
      part.B = std::min(sequences, size.B - b);
      const at::Tensor s_qb = s.narrow(0, q, part.Q).narrow(1, b, part.B);
      const at::Tensor g_b = g.narrow(0, b, part.B), a_b = a.narrow(0, b, part.B);
      if (g.scalar_type() == at::kDouble) {
        accumulate<double>(s_qb, L_q, R_q, g_b, a_b, bias, part);
      } else {
        accumulate<float>(s_qb, L_q, R_q, g_b, a_b, bias, part);
      }
    }
  }
}

}  // namespace
}  // namespace ekfac_fast

TORCH_LIBRARY_IMPL(ekfac_fast, CPU, m) { m.impl("low_rank_scores", &ekfac_fast::low_rank_scores); }
