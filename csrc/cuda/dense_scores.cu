// s_qb += <P_q, G_b>: a gradient tile meets every query in registers. Per sequence only; made for a
// few queries, since each costs a multiply-add an element on plain cores.
#include <ATen/ops/empty.h>

#include "launch.h"
#include "rotations.h"

namespace ekfac_fast::cuda {
namespace {

void dense_scores(at::Tensor& s, const at::Tensor& P, const at::Tensor& g, const at::Tensor& a,
                  bool bias) {
  const Letters size =
      check("dense_scores", "s[Q,B]|[Q,B,T] P[Q,O,J] g[B,T,O] a[B,T,I]", {s, P, g, a}, bias);
  TORCH_CHECK_VALUE(s.dim() == 2, "dense_scores: s has shape ", s.sizes(), ", expected [Q,B]");
  if (s.numel() == 0 || P.numel() == 0 || size.T == 0) return;
  const c10::DeviceGuard guard(g.device());
  const at::Tensor queries = P.stride(2) == 1 ? P : P.contiguous();
  by_dtype(g, [&]<class E>(E) {
    at::Tensor sums;
    // Addresses of P want the registers of a second tile.
    close_tiles<WideTwice, E>(aligned(g), aligned(a), bias, [&](int64_t n) {
      sums = at::empty({size.Q, size.B, n}, s.options());
      return DenseScores<E>{sums.mutable_data_ptr<float>(),
                            data<E>(queries),
                            queries.stride(0),
                            queries.stride(1),
                            static_cast<int>(size.Q),
                            static_cast<int>(size.B)};
    });
    fold(s, sums);
  });
}

}  // namespace
}  // namespace ekfac_fast::cuda

TORCH_LIBRARY_FRAGMENT(ekfac_fast_cuda, m) {
  ekfac_fast::cuda::beside(m, "dense_scores", &ekfac_fast::cuda::dense_scores);
}
