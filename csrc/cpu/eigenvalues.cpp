// lam_sum += sum_b (Qg^T G_b Qa)^2: a gradient tile is squared into lam_sum where it was made.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "endings.h"
#include "gradients.h"

namespace ekfac_fast::cpu {
namespace {

// Tiles that keep a few threads busy; a small layer has fewer, and its sequences are cut into
// parts, each worth waking a thread for.
constexpr int64_t kTiles = 8;
constexpr int64_t kPart = int64_t{1} << 20;  // multiply-adds

// sum += x y
template <class Acc>
void add_product(at::Tensor& sum, const at::Tensor& x, const at::Tensor& y) {
  if (std::is_same_v<Acc, double> || library_is_fastest(at::kFloat)) {
    sum.addmm_(x, y);
    return;
  }
  at::Tensor to = sum.contiguous();
  Acc* data = to.mutable_data_ptr<Acc>();
  product<Acc>(pack_rows(x.unsqueeze(0)), pack_columns(y.unsqueeze(0), x.size(0)),
               [&](int64_t, int64_t m0, int64_t m, int64_t n0, int64_t n, const Acc* C, int64_t ld,
                   int64_t) {
                 for (int64_t i = 0; i < m; i++) {
                   add(data + (m0 + i) * to.size(1) + n0, C + i * ld, n);
                 }
               });
  if (!to.is_same(sum)) sum.copy_(to);
}

template <class Acc>
void accumulate(at::Tensor& lam_sum, const at::Tensor& g, const at::Tensor& a,
                const std::optional<at::Tensor>& Qg, const std::optional<at::Tensor>& Qa, bool bias,
                const Letters& size, const std::optional<c10::string_view>& order) {
  const auto [outputs, inputs] = squared_sides(g, a, Qg, Qa, bias, size, order);
  if (outputs.defined()) {
    add_product<Acc>(lam_sum, outputs.t(), inputs);
    return;
  }
  const int64_t whole = std::max<int64_t>(1, tiles(size));
  const int64_t worth = size.B * size.T * size.O * size.J / kPart;
  const int64_t parts =
      std::clamp<int64_t>(std::min(kTiles / whole, worth), 1, std::max<int64_t>(1, size.B));
  at::Tensor sum =
      parts > 1 ? at::zeros({parts, size.O, size.J}, lam_sum.options()) : lam_sum.contiguous();
  Acc* data = sum.mutable_data_ptr<Acc>();
  gradient_tiles<Acc>(g, a, Qg, Qa, bias, size, order, parts,
                      [&](int64_t, int64_t o0, int64_t o, int64_t j0, int64_t j, const Acc* C,
                          int64_t ld, int64_t index) {
                        join_rows(o, j, ld, size.J);
                        Acc* to = data + (index / whole * size.O + o0) * size.J + j0;
                        for (int64_t i = 0; i < o; i++) add_squares(to + i * size.J, C + i * ld, j);
                      });
  if (parts > 1) {
    lam_sum.add_(sum.sum(0));
  } else if (!sum.is_same(lam_sum)) {
    lam_sum.copy_(sum);
  }
}

void eigenvalues(at::Tensor& lam_sum, const at::Tensor& g, const at::Tensor& a,
                 const std::optional<at::Tensor>& Qg, const std::optional<at::Tensor>& Qa,
                 bool bias, std::optional<c10::string_view> order) {
  const Letters size = check("eigenvalues", "lam_sum[O,J] g[B,T,O] a[B,T,I] Qg[O,O] Qa[J,J]",
                             {lam_sum, g, a, Qg, Qa}, bias, 0.0, order);
  if (g.scalar_type() == at::kDouble) {
    accumulate<double>(lam_sum, g, a, Qg, Qa, bias, size, order);
  } else {
    accumulate<float>(lam_sum, g, a, Qg, Qa, bias, size, order);
  }
}

}  // namespace
}  // namespace ekfac_fast::cpu

TORCH_LIBRARY_IMPL(ekfac_fast, CPU, m) { m.impl("eigenvalues", &ekfac_fast::cpu::eigenvalues); }
