#include "gradients.h"

#include <ATen/ops/empty.h>

#include "endings.h"

namespace ekfac_fast {

Order contraction_order(const Letters& size, const std::optional<c10::string_view>& forced) {
  if (!forced) return {size.T < size.O, size.T < size.J};
  if (*forced == "tokens") return {true, true};
  if (*forced == "a_tokens") return {true, false};
  if (*forced == "g_tokens") return {false, true};
  TORCH_CHECK_VALUE(*forced == "gradient", "order is '", *forced,
                    "', expected one of tokens, a_tokens, g_tokens, gradient");
  return {false, false};
}

int64_t sequences_at_once(const Letters& size, int64_t itemsize) {
  const int64_t bytes = size.T * (size.O + size.J) * std::max<int64_t>(itemsize, 4);
  return std::max<int64_t>(1, (int64_t{32} << 20) / std::max<int64_t>(1, bytes));
}

namespace {

// Writes a tile into y [batch, m, n], adding `bias` [n] to every row.
template <class Out, class Acc>
void store(Out* y, int64_t m, int64_t n, const Acc* C, int64_t ld, int64_t stride, const Acc* bias) {
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

at::Tensor products(const Panels& A, const Panels& B, const at::Tensor& bias) {
  const int64_t batch = std::max(A.batch, B.batch), M = A.extent, N = B.extent;
  at::Tensor y = at::empty({batch, M, N}, at::dtype(A.storage.scalar_type()));
  auto run = [&]<class Out, class Acc>(Out, Acc) {
    Out* data = y.mutable_data_ptr<Out>();
    const Acc* row = bias.defined() ? bias.const_data_ptr<Acc>() : nullptr;
    product<Acc>(A, B, [&](int64_t b, int64_t m0, int64_t m, int64_t n0, int64_t n, const Acc* C,
                           int64_t ld, int64_t) {
      store(data + (b * M + m0) * N + n0, m, n, C, ld, N, row ? row + n0 : nullptr);
    });
  };
  switch (y.scalar_type()) {
    case at::kDouble: run(double{}, double{}); break;
    case at::kBFloat16: run(at::BFloat16{}, float{}); break;
    default: run(float{}, float{});
  }
  return y;
}

}  // namespace

at::Tensor rotate_tokens(const at::Tensor& x, const at::Tensor& Q, bool bias) {
  const int64_t F = x.size(-1);
  const at::Tensor rows = x.reshape({1, -1, F});
  const auto wide = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor last = bias ? Q.select(0, F).to(wide).contiguous() : at::Tensor();
  const at::Tensor y =
      products(pack_rows(rows), pack_columns(Q.narrow(0, 0, F).unsqueeze(0)), last);
  return y.view({x.size(0), x.size(1), Q.size(1)});
}

at::Tensor one_gradient(const at::Tensor& g, const at::Tensor& a, bool bias) {
  return products(pack_rows(g.mT()), pack_columns(a, bias), {});
}

}  // namespace ekfac_fast
