// s_qb += <P_q, G_b>: a gradient tile meets every query while it is in cache. Per token, g P_q
// meets a, tile by tile.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../check.h"
#include "endings.h"
#include "gemm.h"

namespace ekfac_fast::cpu {
namespace {

constexpr int64_t kSequences = 16;  // gradient tiles held at a time: 1 MiB of fp32

// A tile of P_q as dot products read it: in place if it is Acc already, else widened into `room`.
template <class Acc>
const Acc* query_tile(const at::Tensor& P, int64_t q, int64_t o, int64_t m, int64_t j, int64_t n,
                      Acc* room, int64_t& ld) {
  auto from = [&]<class In>(In) -> const Acc* {
    const In* data = P.const_data_ptr<In>() + q * P.stride(0) + o * P.stride(1) + j;
    if constexpr (std::is_same_v<In, Acc>) {
      ld = P.stride(1);
      return data;
    } else {
      ld = n;
      for (int64_t r = 0; r < m; r++) convert(room + r * n, data + r * P.stride(1), n);
      return room;
    }
  };
  if constexpr (std::is_same_v<Acc, double>)
    return from(double{});
  else if (P.scalar_type() == at::kBFloat16)
    return from(at::BFloat16{});
  else if (P.scalar_type() == at::kHalf)
    return from(at::Half{});
  else
    return from(float{});
}

// s [Q,B]. Four queries meet four sequences at a time: sixteen dot products from eight streams.
template <class Acc>
void by_sequence(at::Tensor& s, const at::Tensor& P, const at::Tensor& g, const at::Tensor& a,
                 bool bias, const Letters& size) {
  const Panels A = pack_rows(g.mT()), B = pack_columns(a, size.O, {.ones = bias});
  const int64_t tiles = A.count * B.count, area = A.width * B.line;
  const int64_t Q4 = round_up(size.Q, 4), B4 = round_up(size.B, 4);
  // Partial sums of a few tiles a block; blocks depend on the shape alone, so results repeat.
  const int64_t a_block = ceil_div(tiles, 64), blocks = ceil_div(tiles, a_block);
  at::Tensor partial = at::zeros({blocks, Q4 / 4, B4 / 4, 4, 4}, at::dtype(s.scalar_type()));
  Acc* sums = partial.mutable_data_ptr<Acc>();
  const at::Tensor rows = P.stride(2) == 1 ? P : P.contiguous();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    Tile<Acc> G(std::min(kSequences, B4) * area), room(4 * area);
    for (int64_t tile = begin * a_block; tile < std::min(tiles, end * a_block); tile++) {
      const int64_t i = tile / B.count, j = tile % B.count, block = tile / a_block;
      const int64_t m = A.size(i), n = B.size(j);
      for (int64_t b0 = 0; b0 < B4; b0 += kSequences) {
        const int64_t held = std::min(kSequences, B4 - b0);
        for (int64_t k = 0; k < held; k++) {
          // The last sequence fills up a group of four; its surplus sums are dropped below.
          const int64_t b = std::min(b0 + k, size.B - 1);
          multiply<Acc>(A, b, i, B, b, j, G.data + k * area, B.line);
        }
        for (int64_t q = 0; q < Q4; q += 4) {
          const Acc *x[4], *y[4];
          int64_t ld = 0;
          for (int64_t k = 0; k < 4; k++) {
            x[k] = query_tile(rows, std::min(q + k, size.Q - 1), A.begin(i), m, B.begin(j), n,
                              room.data + k * area, ld);
          }
          for (int64_t b = 0; b < held; b += 4) {
            for (int64_t k = 0; k < 4; k++) y[k] = G.data + (b + k) * area;
            dot_4x4(sums + ((block * (Q4 / 4) + q / 4) * (B4 / 4) + (b0 + b) / 4) * 16, x, ld, y,
                    B.line, m, n);
          }
        }
      }
    }
    release(A);
  });
  const at::Tensor total = partial.sum(0).transpose(1, 2).reshape({Q4, B4});
  s.add_(total.narrow(0, 0, size.Q).narrow(1, 0, size.B));
}

// s [Q,B,T]: row n of g P_q, dotted with row n of (a, 1).
template <class Acc>
void by_token(at::Tensor& s, const at::Tensor& P, const at::Tensor& g, const at::Tensor& a,
              bool bias, const Letters& size) {
  const int64_t N = size.B * size.T;
  const at::Tensor inputs = a.reshape({N, size.I}).to(s.scalar_type()).contiguous();
  const Panels A = pack_rows(g.reshape({1, N, size.O})), B = pack_columns(P, N);
  at::Tensor total = at::zeros({size.Q, N}, at::dtype(s.scalar_type()));
  Acc* sums = total.mutable_data_ptr<Acc>();
  const Acc* data = inputs.const_data_ptr<Acc>();
  at::parallel_for(0, size.Q * A.count, 1, [&](int64_t begin, int64_t end) {
    Tile<Acc> C(A.width * B.line);
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t q = unit / A.count, i = unit % A.count;
      for (int64_t j = 0; j < B.count; j++) {
        multiply<Acc>(A, 0, i, B, q, j, C.data, B.line);
        const int64_t n = std::min(B.size(j), size.I - B.begin(j));
        for (int64_t r = 0; r < A.size(i); r++) {
          const Acc* row = C.data + r * B.line;
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
}  // namespace ekfac_fast::cpu

TORCH_LIBRARY_IMPL(ekfac_fast, CPU, m) { m.impl("dense_scores", &ekfac_fast::cpu::dense_scores); }
