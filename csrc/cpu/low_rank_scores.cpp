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
#include "isa.h"
#include "scratch.h"

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

// A tile of one of the two products, rows `ld` apart.
template <class Acc>
struct Part {
  const Acc* data;
  int64_t ld;
};

// One of the two products.
template <class Acc>
struct Side {
  at::Tensor lines;  // x as panels cut it
  bool library;
  Panels A, B;
  at::Tensor whole;  // [rows, QK] if the library multiplied

  Side(const Rows& rows, const at::Tensor& x, const at::Tensor& factors, int64_t N, int64_t width)
      : lines(rows.cut(x)),
        library((library_multiplies(N, x.size(2), factors.size(2), x.scalar_type()) &&
                 (N <= kFew || x.stride(2) == 1)) ||
                (x.scalar_type() == at::kFloat && factors.size(2) <= kLanes) ||
                // Of a few rows and columns ours is the faster even where the library is else.
                (library_is_fastest(x.scalar_type()) &&
                 (N > 2 * kLanes || N * factors.size(2) > 16 * kTile))),
        A(library ? Panels(lines, false, rows.width) : pack_rows(lines, {.width = rows.width})),
        B(library ? Panels(factors, true, width) : pack_columns(factors, N, {.width = width})) {
    if (!library) return;
    whole = scratch({N, factors.size(2)}, x.scalar_type());
    at::mm_out(whole, lines.reshape({N, -1}), factors[0]);
  }
  // The product of a row panel and a column panel: as it lies, or in `room`.
  Part<Acc> tile(int64_t b, int64_t i, int64_t p, Acc* room) const {
    if constexpr (std::is_same_v<Acc, float>) {
      if (library) {
        const int64_t ld = whole.size(1), first = (b * A.extent + A.begin(i)) * ld + B.begin(p);
        if (whole.scalar_type() == at::kFloat) return {whole.const_data_ptr<float>() + first, ld};
        const at::BFloat16* from = whole.const_data_ptr<at::BFloat16>() + first;
        for (int64_t r = 0; r < A.size(i); r++) {
          convert(room + r * B.line, from + r * ld, B.size(p));
        }
        return {room, B.line};
      }
    }
    multiply<Acc>(A, b, i, B, 0, p, room, B.line);
    return {room, B.line};
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
          const auto [us, ldu] = left.tile(b, i, p, U.data);
          const auto [vs, ldv] = right.tile(b, i, p, V.data);
          // The sum over one token is written as it is made.
          const int64_t run = per_token ? 1 : std::min(size.T, G.size(i));
          for (int64_t r = 0; r < G.size(i); r += run) {
            const int64_t sequence = (first + r) / size.T, token = (first + r) % size.T;
            const Acc *u = us + r * ldu, *v = vs + r * ldv;
            if (run == 1) {
              Acc* to = sums + q * s.stride(0) + sequence * s.stride(1);
              if (per_token) to += token * s.stride(2);
              add_group_dots(to, s.stride(0), u, v, &ones[q * K], queries, K);
              continue;
            }
            std::fill_n(column.data, n, Acc(0));
            for (int64_t t = 0; t < run; t++) {
              add_products(column.data, u + t * ldu, v + t * ldv, &ones[q * K], n);
            }
            if (partial) {
              add_group_sums(&parts[(i * size.Q + q) * size.B + sequence], size.B, column.data,
                             queries, K);
            } else {
              add_group_sums(sums + q * s.stride(0) + sequence * s.stride(1), s.stride(0),
                             column.data, queries, K);
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

// Fewer columns than a vector has lanes: the library's products turned round, [QK,N], whose rows
// are multiplied and summed as they lie.
template <class Acc>
void few_columns(at::Tensor s, const at::Tensor& L, const at::Tensor& R, const at::Tensor& g,
                 const at::Tensor& a, bool bias, const Letters& size) {
  const int64_t K = size.K, N = size.B * size.T;
  const auto wide = c10::CppTypeToScalarType<Acc>::value;
  // Without products of 16 bits the library's run in plain loops.
  const bool widened = !has_avx512() && library_is_fastest(wide) && g.scalar_type() != wide;
  auto product = [&](const at::Tensor& factors, const at::Tensor& x) {
    const at::Tensor left = factors.contiguous(), rows = x.reshape({N, x.size(2)});
    if (!widened) return at::mm(left, rows.t()).to(wide);
    const at::Tensor wide_left = left.to(wide);
    at::Tensor y = scratch({left.size(0), N}, wide);
    for (int64_t n = 0; n < N; n += 2 * kFew) {  // rows that stay in cache
      const int64_t some = std::min(2 * kFew, N - n);
      at::Tensor part = y.narrow(1, n, some);
      at::mm_out(part, wide_left, rows.narrow(0, n, some).to(wide).t());
    }
    return y;
  };
  const at::Tensor right = R.reshape({size.Q * K, size.J});
  const at::Tensor U = product(L.mT().reshape({size.Q * K, size.O}), g);
  const at::Tensor V = product(bias ? right.narrow(1, 0, size.I) : right, a);
  const at::Tensor ones = bias ? right.select(1, size.I).to(wide).contiguous() : at::Tensor();
  const Acc *u = U.const_data_ptr<Acc>(), *v = V.const_data_ptr<Acc>(),
            *last = bias ? ones.const_data_ptr<Acc>() : nullptr;
  Acc* sums = s.mutable_data_ptr<Acc>();
  at::parallel_for(0, size.Q, grain(N * K), [&](int64_t begin, int64_t end) {
    Tile<Acc> row(N);
    for (int64_t q = begin; q < end; q++) {
      std::fill_n(row.data, N, Acc(0));
      for (int64_t k = q * K; k < (q + 1) * K; k++) {
        add_products(row.data, u + k * N, v + k * N, bias ? last[k] : Acc(0), N);
      }
      Acc* to = sums + q * s.stride(0);
      if (s.dim() == 2) {
        add_group_sums(to, s.stride(1), row.data, size.B, size.T);
        continue;
      }
      for (int64_t n = 0; n < N; n++) {
        to[n / size.T * s.stride(1) + n % size.T * s.stride(2)] += row.data[n];
      }
    }
  });
}

// Part of x, or x itself.
at::Tensor some(const at::Tensor& x, int64_t dim, int64_t from, int64_t length) {
  return length == x.size(dim) ? x : x.narrow(dim, from, length);
}

void low_rank_scores(at::Tensor& s, const at::Tensor& L, const at::Tensor& R, const at::Tensor& g,
                     const at::Tensor& a, bool bias) {
  const Letters size =
      check("low_rank_scores", "s[Q,B]|[Q,B,T] L[Q,O,K] R[Q,K,J] g[B,T,O] a[B,T,I]",
            {s, L, R, g, a}, bias);
  if (s.numel() == 0 || size.K == 0 || size.T == 0) return;
  // A slab of queries against a slab of sequences at a time; a tile of the rank, if it is larger.
  // Factors side by side are not packed for few rows: they need no slabs.
  const int64_t lines = slab_lines(std::max(size.O, size.I));
  const int64_t group = std::max<int64_t>(1, kTile / size.K);
  const bool in_place = size.B * size.T <= kFew && L.stride(0) == size.K * L.stride(2) &&
                        R.stride(0) == size.K * R.stride(1);
  const int64_t queries = in_place ? size.Q : round_up(ceil_div(lines, size.K), group);
  // What the library multiplies is written whole: no more of it than a slab, either.
  const int64_t columns = std::min(queries, size.Q) * std::min(kTile, size.K);
  const int64_t written = slab_lines(library_is_fastest(g.scalar_type()) ? 4 * columns : columns);
  const int64_t sequences = ceil_div(std::min(lines, written), size.T);
  for (int64_t q = 0; q < size.Q; q += queries) {
    for (int64_t k = 0; k < size.K; k += kTile) {
      Letters part = size;
      part.Q = std::min(queries, size.Q - q);
      part.K = std::min(kTile, size.K - k);
      const at::Tensor L_q = some(some(L, 0, q, part.Q), 2, k, part.K);
      const at::Tensor R_q = some(some(R, 0, q, part.Q), 1, k, part.K);
      // Of up to four the library's product is faster as it is than turned round.
      const int64_t least = library_is_fastest(g.scalar_type()) ? 5 : 0;
      const bool few = part.Q * part.K < kLanes && part.Q * part.K >= least &&
                       (g.scalar_type() != at::kHalf || (g.stride(2) == 1 && a.stride(2) == 1));
      for (int64_t b = 0; b < size.B; b += sequences) {
        part.B = std::min(sequences, size.B - b);
        const at::Tensor s_qb = some(some(s, 0, q, part.Q), 1, b, part.B);
        const at::Tensor g_b = some(g, 0, b, part.B), a_b = some(a, 0, b, part.B);
        auto run = [&]<class Acc>(Acc) {
          (few ? few_columns<Acc> : accumulate<Acc>)(s_qb, L_q, R_q, g_b, a_b, bias, part);
        };
        g.scalar_type() == at::kDouble ? run(double{}) : run(float{});
      }
    }
  }
}

}  // namespace
}  // namespace ekfac_fast::cpu

TORCH_LIBRARY_IMPL(ekfac_fast, CPU, m) {
  m.impl("low_rank_scores", &ekfac_fast::cpu::low_rank_scores);
}
