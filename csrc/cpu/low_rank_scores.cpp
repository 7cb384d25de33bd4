// s_qb += sum_tk (g_bt . L_q[:,k]) (R_q[k,:] . (a_bt, 1)): two products over the same rows and
// columns, one tile of each at a time, multiplied and summed before the next.
//
// Columns are the queries' factors side by side, [O,QK] and [J,QK]: in place if that is how L and R
// lie. A column panel holds whole queries (128 / K of them), a row panel whole sequences or a part
// of one: a sum closes inside its tile.
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <vector>

#include "../check.h"
#include "endings.h"
#include "gemm.h"

namespace ekfac_fast::cpu {
namespace {

// Rows of a panel: fewer than a tile if there are few of them, so that a few threads have work.
int64_t rows_at_once(int64_t rows, int64_t column_panels) {
  return std::clamp<int64_t>(round_up(rows * column_panels / 4, kLanes), 2 * kLanes, kTile);
}

// `rows` tokens of sequences that follow each other, as many as belong together.
struct Rows {
  int64_t width;  // rows of a panel
  bool merged;    // panels hold whole sequences, else a part of one

  Rows(const Letters& size, int64_t column_panels) {
    const int64_t most = rows_at_once(size.B * size.T, column_panels);
    merged = size.T <= most;
    width = merged ? most / size.T * size.T : ceil_div(size.T, ceil_div(size.T, most));
  }
  at::Tensor cut(const at::Tensor& x) const { return merged ? x.reshape({1, -1, x.size(2)}) : x; }
};

// One of the two products.
template <class Acc>
struct Side {
  bool library;
  Panels A, B;
  at::Tensor whole;  // [rows, QK] if the library multiplied

  Side(const Rows& rows, const at::Tensor& x, const at::Tensor& factors, int64_t N, int64_t width)
      // Fewer columns than a vector has lanes leave the others idle.
      : library(library_multiplies(N, x.scalar_type()) ||
                (factors.size(2) < kLanes && x.scalar_type() != at::kHalf)),
        A(library ? Panels(rows.cut(x), false, rows.width)
                  : pack_rows(rows.cut(x), {.width = rows.width})),
        B(library ? Panels(factors, true, width) : pack_columns(factors, N, {.width = width})) {
    if (library)
      whole = at::mm(x.reshape({N, -1}), factors[0]).to(c10::CppTypeToScalarType<Acc>::value);
  }
  // The product of a row panel and a column panel: in `room`, or where it is already.
  const Acc* tile(int64_t b, int64_t i, int64_t p, Acc* room, int64_t& ld) const {
    if (library) {
      ld = whole.size(1);
      return whole.const_data_ptr<Acc>() + (b * A.extent + A.begin(i)) * ld + B.begin(p);
    }
    ld = B.line;
    multiply<Acc>(A, b, i, B, 0, p, room, ld);
    return room;
  }
};

template <class Acc>
void accumulate(at::Tensor s, const at::Tensor& L, const at::Tensor& R, const at::Tensor& g,
                const at::Tensor& a, bool bias, const Letters& size) {
  const int64_t K = size.K, group = std::max<int64_t>(1, kTile / K), N = size.B * size.T;
  const Rows rows(size, ceil_div(size.Q, group));
  const at::Tensor left_factors = L.permute({1, 0, 2}).reshape({1, size.O, size.Q * K});
  const at::Tensor right_factors = R.reshape({1, size.Q * K, size.J}).mT();
  const Side<Acc> left(rows, g, left_factors, N, group * K);
  const Side<Acc> right(rows, a, right_factors.narrow(1, 0, size.I), N, group * K);
  // The constant 1 of a bias meets column J of R: the same addend for every row.
  std::vector<Acc> ones(size.Q * K, Acc(0));
  if (bias) {
    const at::Tensor last = right_factors.select(1, size.I).to(s.scalar_type()).contiguous();
    std::copy_n(last.const_data_ptr<Acc>(), size.Q * K, ones.data());
  }
  const bool per_token = s.dim() == 3, partial = !rows.merged && !per_token;
  // Sums of the panels of one sequence are added in fixed order.
  std::vector<Acc> parts(partial ? left.A.count * size.Q * size.B : 0, Acc(0));
  Acc* sums = s.mutable_data_ptr<Acc>();
  const Panels &G = left.A, &columns = left.B;
  const int64_t line = columns.line;
  // Column panels innermost: factors stay in the last-level cache while rows stream past.
  const int64_t work = G.width * line * (size.O + size.I);
  at::parallel_for(
      0, G.batch * G.count * columns.count, grain(work), [&](int64_t begin, int64_t end) {
        Tile<Acc> U(G.width * line), V(G.width * line), column(line);
        for (int64_t unit = begin; unit < end; unit++) {
          const int64_t p = unit % columns.count, row = unit / columns.count;
          const int64_t b = row / G.count, i = row % G.count, first = b * size.T + G.begin(i);
          const int64_t n = columns.size(p), queries = n / K, q = p * group;
          int64_t ldu, ldv;
          const Acc* u = left.tile(b, i, p, U.data, ldu);
          const Acc* v = right.tile(b, i, p, V.data, ldv);
          const int64_t run = per_token ? 1 : std::min(size.T, G.size(i));
          for (int64_t r = 0; r < G.size(i); r += run) {
            std::fill_n(column.data, n, Acc(0));
            for (int64_t t = r; t < r + run; t++) {
              add_products(column.data, u + t * ldu, v + t * ldv, &ones[q * K], n);
            }
            const int64_t sequence = (first + r) / size.T, token = (first + r) % size.T;
            if (partial) {
              add_group_sums(&parts[(i * size.Q + q) * size.B + sequence], size.B, column.data,
                             queries, K);
            } else {
              add_group_sums(sums + q * s.stride(0) + sequence * s.stride(1) +
                                 (per_token ? token * s.stride(2) : 0),
                             s.stride(0), column.data, queries, K);
            }
          }
        }
        release(G);
      });
  for (int64_t i = 0; i < (partial ? G.count : 0); i++) {
    for (int64_t q = 0; q < size.Q; q++) {
      for (int64_t b = 0; b < size.B; b++) {
        sums[q * s.stride(0) + b * s.stride(1)] += parts[(i * size.Q + q) * size.B + b];
      }
    }
  }
}

void low_rank_scores(at::Tensor& s, const at::Tensor& L, const at::Tensor& R, const at::Tensor& g,
                     const at::Tensor& a, bool bias) {
  const Letters size =
      check("low_rank_scores", "s[Q,B]|[Q,B,T] L[Q,O,K] R[Q,K,J] g[B,T,O] a[B,T,I]",
            {s, L, R, g, a}, bias);
  if (s.numel() == 0 || size.K == 0 || size.T == 0) return;
  // A slab of queries against a slab of sequences at a time; a tile of the rank, if it is larger.
  const int64_t lines = slab_lines(std::max(size.O, size.I));
  const int64_t group = std::max<int64_t>(1, kTile / size.K);
  const int64_t queries = round_up(ceil_div(lines, size.K), group);
  const int64_t sequences = ceil_div(lines, size.T);
  for (int64_t q = 0; q < size.Q; q += queries) {
    for (int64_t k = 0; k < size.K; k += kTile) {
      Letters part = size;
      part.Q = std::min(queries, size.Q - q);
      part.K = std::min(kTile, size.K - k);
      const at::Tensor L_q = L.narrow(0, q, part.Q).narrow(2, k, part.K);
      const at::Tensor R_q = R.narrow(0, q, part.Q).narrow(1, k, part.K);
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
}

}  // namespace
}  // namespace ekfac_fast::cpu

TORCH_LIBRARY_IMPL(ekfac_fast, CPU, m) {
  m.impl("low_rank_scores", &ekfac_fast::cpu::low_rank_scores);
}
