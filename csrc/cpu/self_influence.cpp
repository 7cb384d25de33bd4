// s_b += sum (Qg^T G_b Qa)^2 / (lam + damping): a tile becomes one number where it was computed.
#include <torch/library.h>

#include <vector>

#include "endings.h"
#include "gradients.h"

namespace ekfac_fast::cpu {
namespace {

void self_influence(at::Tensor& s, const at::Tensor& g, const at::Tensor& a,
                    const std::optional<at::Tensor>& Qg, const std::optional<at::Tensor>& Qa,
                    const at::Tensor& lam, double damping, bool bias,
                    std::optional<c10::string_view> order) {
  const Letters size = check("self_influence", "s[B] g[B,T,O] a[B,T,I] Qg[O,O] Qa[J,J] lam[O,J]",
                             {s, g, a, Qg, Qa, lam}, bias, damping, order);
  const at::Tensor values = lam.contiguous();
  auto run = [&]<class Acc>(Acc) {
    // One partial sum a tile, added up in fixed order: the result never depends on which thread was
    // first.
    const int64_t count = tiles(size);
    std::vector<double> sums(size.B * count, 0.0);
    const Acc* lams = values.const_data_ptr<Acc>();
    gradient_tiles<Acc>(g, a, Qg, Qa, bias, size, order, size.B,
                        [&](int64_t b, int64_t o0, int64_t o, int64_t j0, int64_t j, const Acc* C,
                            int64_t ld, int64_t index) {
                          sums[b * count + index % count] =
                              damped_norm(C, ld, lams + o0 * size.J + j0, size.J,
                                          static_cast<Acc>(damping), o, j);
                        });
    Acc* out = s.mutable_data_ptr<Acc>();
    for (int64_t b = 0; b < size.B; b++) {
      double sum = 0;
      for (int64_t tile = 0; tile < count; tile++) sum += sums[b * count + tile];
      out[b * s.stride(0)] += static_cast<Acc>(sum);
    }
  };
  g.scalar_type() == at::kDouble ? run(double{}) : run(float{});
}

}  // namespace
}  // namespace ekfac_fast::cpu

TORCH_LIBRARY_IMPL(ekfac_fast, CPU, m) {
  m.impl("self_influence", &ekfac_fast::cpu::self_influence);
}
