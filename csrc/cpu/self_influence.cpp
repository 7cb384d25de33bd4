// s_b += sum (Qg^T G_b Qa)^2 / (lam + damping): a tile becomes one number where it was computed.
#include <torch/library.h>

#include <vector>

#include "damping.h"
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
  auto run = [&]<class Acc>(Acc) {
    const Damping<Acc> damped(lam, damping, size.B);
    // One partial sum a tile, added up in fixed order: the result never depends on which thread was
    // first.
    int64_t count = tiles(size);
    std::vector<double> sums(size.B * count, 0.0);
    std::pair<at::Tensor, at::Tensor> squares;
    if (damped.reciprocals().defined()) squares = squared_sides(g, a, Qg, Qa, bias, size, order);
    if (const auto& [outputs, inputs] = squares; outputs.defined()) {
      // sum_oj u_o^2 v_j^2 w_oj: rows of u^2 W meet those of v^2.
      count = ceil_div(size.J, kTile);
      const Acc* v = inputs.template const_data_ptr<Acc>();
      fastest_product<Acc>(
          outputs.unsqueeze(0), damped.reciprocals().unsqueeze(0),
          [&](int64_t, int64_t b0, int64_t some, int64_t j0, int64_t j, const Acc* C, int64_t ld,
              int64_t index) {
            for (int64_t b = b0; b < b0 + some; b++, C += ld) {
              sums[b * count + index % count] = dot(C, v + b * size.J + j0, j);
            }
          },
          1);
    } else {
      gradient_tiles<Acc>(g, a, Qg, Qa, bias, size, order, size.B,
                          [&](int64_t b, int64_t o0, int64_t o, int64_t j0, int64_t j, const Acc* C,
                              int64_t ld, int64_t index) {
                            join_rows(o, j, ld, size.J);
                            sums[b * count + index % count] =
                                damped.norm(C, ld, o0 * size.J + j0, o, j);
                          });
    }
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
