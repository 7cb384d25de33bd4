// P_b = (Qg^T G_b Qa) / (lam + damping): divided where the tile was computed.
#include <ATen/ops/empty.h>

#include "launch.h"
#include "rotations.h"

namespace ekfac_fast::cuda {
namespace {

at::Tensor precondition(const at::Tensor& g, const at::Tensor& a,
                        const std::optional<at::Tensor>& Qg, const std::optional<at::Tensor>& Qa,
                        const at::Tensor& lam, double damping, bool bias,
                        std::optional<c10::string_view> order) {
  const Letters size = check("precondition", "g[B,T,O] a[B,T,I] Qg[O,O] Qa[J,J] lam[O,J]",
                             {g, a, Qg, Qa, lam}, bias, damping, order);
  at::Tensor P = at::empty({size.B, size.O, size.J}, lam.options());
  if (g.numel() == 0 || P.numel() == 0) return P.zero_();
  const c10::DeviceGuard guard(g.device());
  const at::Tensor values = lam.contiguous();
  by_dtype(g, [&]<class E>(E) {
    rotated(g, a, Qg, Qa, bias, size, order,
            [&](int64_t first, const at::Tensor& x, const at::Tensor& y) {
              close_tiles<Wide, E>(x, y, false, [&](int64_t) {
                return Precondition{P[first].mutable_data_ptr<float>(),
                                    values.const_data_ptr<float>(), static_cast<float>(damping)};
              });
            });
  });
  return P;
}

}  // namespace
}  // namespace ekfac_fast::cuda

TORCH_LIBRARY_FRAGMENT(ekfac_fast_cuda, m) {
  ekfac_fast::cuda::beside(m, "precondition", &ekfac_fast::cuda::precondition);
}
