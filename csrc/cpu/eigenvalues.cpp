// lam_sum += sum_b (Qg^T G_b Qa)^2: a gradient tile is squared into lam_sum where it was made.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "endings.h"
#include "gradients.h"

namespace ekfac_fast::cpu {
namespace {

// Tiles that keep a few threads busy; a small layer has fewer, and its sequences are cut into
// parts.
constexpr int64_t kTiles = 8;

template <class Acc>
void accumulate(at::Tensor& lam_sum, const at::Tensor& g, const at::Tensor& a,
                const std::optional<at::Tensor>& Qg, const std::optional<at::Tensor>& Qa, bool bias,
                const Letters& size, const std::optional<c10::string_view>& order) {
  const int64_t whole = std::max<int64_t>(1, tiles(size));
  const int64_t parts = std::clamp<int64_t>(kTiles / whole, 1, std::max<int64_t>(1, size.B));
  at::Tensor sum =
      parts > 1 ? at::zeros({parts, size.O, size.J}, lam_sum.options()) : lam_sum.contiguous();
  Acc* data = sum.mutable_data_ptr<Acc>();
  gradient_tiles<Acc>(g, a, Qg, Qa, bias, size, order, parts,
                      [&](int64_t, int64_t o0, int64_t o, int64_t j0, int64_t j, const Acc* C,
                          int64_t ld, int64_t index) {
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
