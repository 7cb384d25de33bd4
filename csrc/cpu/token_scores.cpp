#include "token_scores.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>

#include "endings.h"
#include "gemm.h"
#include "gradients.h"

namespace ekfac_fast::cpu {
namespace {

constexpr int64_t kWritten = 1 << 18;  // elements of products that stay in cache

// Whether products per token are at::mm's, which packs neither side: of narrow inputs and few
// queries, and wherever it is the fastest.
bool is_the_library(const at::Tensor& P) {
  return library_is_fastest(P.scalar_type()) ||
         (P.scalar_type() == at::kFloat && compute_dtype(at::kFloat) == at::kFloat &&
          P.size(2) <= kNarrow && P.size(0) < 4);
}

// sums[q,n] += sum_f (P_q x_n)[f] y_nf for P [Q,F,K], x [N,K], y [N,F]: products [F,N], rows of P
// as they lie, whose rows meet those of y^T.
template <class Acc>
void add_forms(Acc* sums, const at::Tensor& P, const at::Tensor& x, const at::Tensor& y) {
  const int64_t Q = P.size(0), N = x.size(0);
  const at::Tensor turned = y.t().to(c10::CppTypeToScalarType<Acc>::value).contiguous();
  const Acc* data = turned.const_data_ptr<Acc>();
  const Panels A = pack_rows(P), B = pack_columns(x.t().unsqueeze(0), P.size(1));
  const int64_t work = A.extent * B.width * A.depth;
  at::parallel_for(0, B.count * Q, grain(work), [&](int64_t begin, int64_t end) {
    Tile<Acc> C(A.width * B.line);
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t p = unit / Q, q = unit % Q, first = B.begin(p);
      for (int64_t i = 0; i < A.count; i++) {
        multiply<Acc>(A, q, i, B, 0, p, C.data, B.line);
        for (int64_t f = 0; f < A.size(i); f++) {
          add_products(sums + q * N + first, data + (A.begin(i) + f) * N + first,
                       C.data + f * B.line, Acc(0), B.size(p));
        }
      }
    }
    release(A);
  });
}

// The same by rows: y_n P_q of a row panel, dotted with x_n, for y [N,F], x [N,K].
template <class Acc>
void add_dots(Acc* sums, const at::Tensor& P, const at::Tensor& y, const at::Tensor& x) {
  const int64_t Q = P.size(0), N = x.size(0), K = x.size(1);
  const at::Tensor rows = x.to(c10::CppTypeToScalarType<Acc>::value).contiguous();
  const Acc* data = rows.const_data_ptr<Acc>();
  auto close = [&](int64_t q, int64_t m0, int64_t m, int64_t j, int64_t n, const Acc* C,
                   int64_t ld) {
    for (int64_t r = m0; r < m0 + m; r++, C += ld) sums[q * N + r] += dot(C, data + r * K + j, n);
  };
  if (is_the_library(P)) {
    const int64_t step = std::clamp(kWritten / K, std::min(kFew, N), N), steps = ceil_div(N, step);
    const int64_t most = std::clamp<int64_t>(kWritten / (step * K), 1, Q);
    return at::parallel_for(
        0, ceil_div(Q, most) * steps, grain(most * step * P[0].numel()),
        [&](int64_t begin, int64_t end) {
          Tile<Acc> room(most * step * K);
          for (int64_t unit = begin; unit < end; unit++) {
            const int64_t q0 = unit / steps * most, n = unit % steps * step;
            const int64_t queries = std::min(most, Q - q0), m = std::min(step, N - n);
            at::Tensor products = at::from_blob(room.data, {queries, m, K}, y.options());
            at::bmm_out(products, y.narrow(0, n, m).expand({queries, -1, -1}),
                        P.narrow(0, q0, queries));
            for (int64_t q = 0; q < queries; q++) {
              add_group_dots(sums + (q0 + q) * N + n, 1, room.data + q * m * K, data + n * K, m, K);
            }
          }
        });
  }
  const Panels A = pack_rows(y.unsqueeze(0));
  if constexpr (std::is_same_v<Acc, float>) {
    if (N <= kFew && P.element_size() == 2) {
      return at::parallel_for(0, Q, 1, [&](int64_t begin, int64_t end) {
        for (int64_t q = begin; q < end; q++) {
          const Matrix columns(P, 2, 1, q, 0);
          const Passing product{A, columns, P.size(1), K};
          product(0, product.count,
                  [&](int64_t i, int64_t m, int64_t, int64_t j, int64_t n, const Acc* C,
                      int64_t ld) { close(q, A.begin(i), m, j, n, C, ld); });
        }
      });
    }
  }
  const Panels B = pack_columns(P, N);
  at::parallel_for(0, Q * A.count, 1, [&](int64_t begin, int64_t end) {
    Tile<Acc> C(A.width * B.line);
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t q = unit / A.count, i = unit % A.count;
      for (int64_t j = 0; j < B.count; j++) {
        multiply<Acc>(A, 0, i, B, q, j, C.data, B.line);
        close(q, A.begin(i), A.size(i), B.begin(j), B.size(j), C.data, B.line);
      }
    }
    release(A);
  });
}

// s [Q,B,T]: g_n^T P_q (a_n, 1) for every token. A long side is contracted first, and a narrow one
// last, by whole vectors of tokens where these pay for the turning.
template <class Acc>
void accumulate(const at::Tensor& s, const at::Tensor& P, const at::Tensor& g, const at::Tensor& a,
                bool bias, const Letters& size) {
  const int64_t N = size.B * size.T, O = size.O, J = size.J, Q = size.Q;
  at::Tensor total = at::zeros({Q, N}, at::dtype(s.scalar_type()));
  Acc* sums = total.mutable_data_ptr<Acc>();
  const at::Tensor outputs = g.reshape({N, O}), rows = a.reshape({N, size.I});
  const at::Tensor inputs = bias ? with_ones(rows) : rows;
  if (library_is_fastest(P.scalar_type())) {
    // The wider side is contracted first: less is written.
    J > O ? add_dots<Acc>(sums, P.mT(), inputs, outputs) : add_dots<Acc>(sums, P, outputs, inputs);
  } else if (J >= 2 * O && N > kLanes && (Q >= 4 || N <= kFew)) {
    add_forms(sums, P, inputs, outputs);
  } else if (J <= kNarrow && !is_the_library(P) &&
             N >= (O <= kDepth || J <= kNarrow / 2 ? kTile / 2 : 4 * kTile)) {
    add_forms(sums, P.mT(), outputs, inputs);
  } else {
    add_dots(sums, P, outputs, inputs);
  }
  s.add_(total.view({Q, size.B, size.T}));
}

}  // namespace

void token_scores(const at::Tensor& s, const at::Tensor& P, const at::Tensor& g,
                  const at::Tensor& a, bool bias, const Letters& size) {
  if (g.scalar_type() == at::kDouble) {
    accumulate<double>(s, P, g, a, bias, size);
  } else {
    accumulate<float>(s, P, g, a, bias, size);
  }
}

}  // namespace ekfac_fast::cpu
