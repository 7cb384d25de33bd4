#include "gradients.h"

#include "endings.h"
#include "scratch.h"

namespace ekfac_fast {

int64_t sequences_at_once(const Letters& size) {
  return std::max<int64_t>(
      1, kSlabBytes / (4 * std::max<int64_t>(1, size.T * std::max(size.O, size.J))));
}

namespace {

// Writes a tile into y [batch, m, n], adding `bias` [n] to every row.
template <class Out, class Acc>
void store(Out* y, int64_t m, int64_t n, const Acc* C, int64_t ld, int64_t stride,
           const Acc* bias) {
  Acc row[kTile];
  for (int64_t i = 0; i < m; i++) {
    const Acc* from = C + i * ld;
    if (bias) {
      std::copy_n(from, n, row);
      add(row, bias, n);
      from = row;
    }
    convert(y + i * stride, from, n);
  }
}

// Columns [at, at + B.extent) of y [batch, m, n] = A B + bias.
void multiply_into(at::Tensor& y, int64_t at, const Panels& A, const Panels& B,
                   const at::Tensor& bias) {
  const int64_t M = A.extent, N = y.size(2);
  auto run = [&]<class Out, class Acc>(Out, Acc) {
    Out* data = y.mutable_data_ptr<Out>() + at;
    const Acc* row = bias.defined() ? bias.const_data_ptr<Acc>() + at : nullptr;
    product<Acc>(A, B,
                 [&](int64_t b, int64_t m0, int64_t m, int64_t n0, int64_t n, const Acc* C,
                     int64_t ld, int64_t) {
                   store(data + (b * M + m0) * N + n0, m, n, C, ld, N, row ? row + n0 : nullptr);
                 });
  };
  switch (y.scalar_type()) {
    case at::kDouble: run(double{}, double{}); break;
    case at::kBFloat16: run(at::BFloat16{}, float{}); break;
    default: run(float{}, float{});
  }
}

}  // namespace

at::Tensor rotate_tokens(const at::Tensor& x, const at::Tensor& Q, bool bias) {
  const int64_t F = x.size(-1);
  const at::Tensor rows = x.reshape({1, -1, F});
  const auto wide = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor last = bias ? Q.select(0, F).to(wide).contiguous() : at::Tensor();
  const Panels A = pack_rows(rows);
  at::Tensor y = scratch({1, A.extent, Q.size(1)}, A.storage.scalar_type());
  const int64_t step = slab_lines(F);
  for (int64_t n = 0; n < Q.size(1); n += step) {
    const at::Tensor slab = Q.narrow(0, 0, F).narrow(1, n, std::min(step, Q.size(1) - n));
    multiply_into(y, n, A, pack_columns(slab.unsqueeze(0)), last);
  }
  return y.view({x.size(0), x.size(1), Q.size(1)});
}

at::Tensor one_gradient(const at::Tensor& g, const at::Tensor& a, bool bias) {
  const Panels A = pack_rows(g.mT()), B = pack_columns(a, bias);
  at::Tensor G = scratch({1, A.extent, B.extent}, A.storage.scalar_type());
  multiply_into(G, 0, A, B, {});
  return G;
}

}  // namespace ekfac_fast
