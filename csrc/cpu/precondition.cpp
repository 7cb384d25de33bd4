// P_b = (Qg^T G_b Qa) / (lam + damping): the tile is divided on its way to memory.
#include <torch/library.h>

#include "endings.h"
#include "gradients.h"
#include "scratch.h"

namespace ekfac_fast::cpu {
namespace {

at::Tensor precondition(const at::Tensor& g, const at::Tensor& a,
                        const std::optional<at::Tensor>& Qg, const std::optional<at::Tensor>& Qa,
                        const at::Tensor& lam, double damping, bool bias,
                        std::optional<c10::string_view> order) {
  const Letters size = check("precondition", "g[B,T,O] a[B,T,I] Qg[O,O] Qa[J,J] lam[O,J]",
                             {g, a, Qg, Qa, lam}, bias, damping, order);
  at::Tensor P = scratch({size.B, size.O, size.J}, lam.scalar_type());
  const at::Tensor values = lam.contiguous();
  auto run = [&]<class Acc>(Acc) {
    Acc* out = P.mutable_data_ptr<Acc>();
    const Acc* lams = values.const_data_ptr<Acc>();
    gradient_tiles<Acc>(g, a, Qg, Qa, bias, size, order, size.B,
                        [&](int64_t b, int64_t o0, int64_t o, int64_t j0, int64_t j, const Acc* C,
                            int64_t ld, int64_t) {
                          join_rows(o, j, ld, size.J);
                          for (int64_t i = 0; i < o; i++) {
                            const int64_t at = (o0 + i) * size.J + j0;
                            divide(out + b * size.O * size.J + at, C + i * ld, lams + at,
                                   static_cast<Acc>(damping), j);
                          }
                        });
  };
  g.scalar_type() == at::kDouble ? run(double{}) : run(float{});
  return P;
}

}  // namespace
}  // namespace ekfac_fast::cpu

TORCH_LIBRARY_IMPL(ekfac_fast, CPU, m) { m.impl("precondition", &ekfac_fast::cpu::precondition); }
