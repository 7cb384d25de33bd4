// s_b += sum (Qg^T G_b Qa)^2 / (lam + damping): every warp of every tile leaves one number.
#include <ATen/ops/empty.h>

#include "launch.h"
#include "rotations.h"

namespace ekfac_fast::cuda {
namespace {

void self_influence(at::Tensor& s, const at::Tensor& g, const at::Tensor& a,
                    const std::optional<at::Tensor>& Qg, const std::optional<at::Tensor>& Qa,
                    const at::Tensor& lam, double damping, bool bias,
                    std::optional<c10::string_view> order) {
  const Letters size = check("self_influence", "s[B] g[B,T,O] a[B,T,I] Qg[O,O] Qa[J,J] lam[O,J]",
                             {s, g, a, Qg, Qa, lam}, bias, damping, order);
  if (g.numel() == 0 || size.J == 0) return;
  const c10::DeviceGuard guard(g.device());
  const at::Tensor values = lam.contiguous();
  by_dtype(g, [&]<class E>(E) {
    rotated(g, a, Qg, Qa, bias, size, order,
            [&](int64_t first, const at::Tensor& x, const at::Tensor& y) {
              at::Tensor sums;
              close_tiles<Wide, E>(x, y, false, [&](int64_t n) {
                sums = at::empty({x.size(0), n}, s.options());
                return SelfInfluence{sums.mutable_data_ptr<float>(), values.const_data_ptr<float>(),
                                     static_cast<float>(damping)};
              });
              fold(s.narrow(0, first, x.size(0)), sums);
            });
  });
}

}  // namespace
}  // namespace ekfac_fast::cuda

TORCH_LIBRARY_FRAGMENT(ekfac_fast_cuda, m) {
  ekfac_fast::cuda::beside(m, "self_influence", &ekfac_fast::cuda::self_influence);
}
