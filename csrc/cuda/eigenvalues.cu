// lam_sum += sum_b (Qg^T G_b Qa)^2: a block keeps a tile of lam in registers over its sequences.
#include <ATen/ops/empty.h>

#include "launch.h"
#include "rotations.h"

namespace ekfac_fast::cuda {
namespace {

template <class Tiling, class E>
void accumulate(const at::Tensor& lam_sum, const Layer<E>& x, int64_t B) {
  // Sequences are split between blocks where tiles do not fill the chip.
  const int64_t tiles = x.template tiles<Tiling>();
  const int64_t wanted = std::max<int64_t>(1, 2 * processors() / tiles);
  const int64_t per_split = cdiv(B, std::min(B, wanted)), S = cdiv(B, per_split);
  const at::Tensor parts =
      S == 1 ? lam_sum.contiguous() : at::empty({S, x.O, x.J()}, lam_sum.options());
  launch(eigenvalues_kernel<Tiling, E>, tiles * S, Tiling::threads, Tiling::shared, x,
         parts.mutable_data_ptr<float>(), B, per_split, S == 1);
  if (S > 1)
    lam_sum.add_(parts.sum(0));
  else if (!parts.is_same(lam_sum))
    lam_sum.copy_(parts);
}

void eigenvalues(at::Tensor& lam_sum, const at::Tensor& g, const at::Tensor& a,
                 const std::optional<at::Tensor>& Qg, const std::optional<at::Tensor>& Qa,
                 bool bias, std::optional<c10::string_view> order) {
  const Letters size = check("eigenvalues", "lam_sum[O,J] g[B,T,O] a[B,T,I] Qg[O,O] Qa[J,J]",
                             {lam_sum, g, a, Qg, Qa}, bias, 0.0, order);
  if (g.numel() == 0 || size.J == 0) return;
  const c10::DeviceGuard guard(g.device());
  by_dtype(g, [&]<class E>(E) {
    rotated(g, a, Qg, Qa, bias, size, order,
            [&](int64_t, const at::Tensor& x, const at::Tensor& y) {
              const Layer<E> on = layer<E>(x, y, bias && !Qa);
              if (wide(size.O, size.J, 1))
                accumulate<WideTwice>(lam_sum, on, x.size(0));
              else
                accumulate<Small>(lam_sum, on, x.size(0));
            });
  });
}

}  // namespace
}  // namespace ekfac_fast::cuda

TORCH_LIBRARY_FRAGMENT(ekfac_fast_cuda, m) {
  ekfac_fast::cuda::beside(m, "eigenvalues", &ekfac_fast::cuda::eigenvalues);
}
