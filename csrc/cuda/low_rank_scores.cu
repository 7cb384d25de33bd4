// s_qb += sum_tk (g_bt . L_q[:,k]) (R_q[k,:] . (a_bt, 1)), or [Q,B,T] per token: two products,
// closed in registers over the rank, and a second launch over tokens.
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>

#include "launch.h"
#include "low_rank.cuh"
#include "rotations.h"

namespace ekfac_fast::cuda {
namespace {

void low_rank_scores(at::Tensor& s, const at::Tensor& L, const at::Tensor& R, const at::Tensor& g,
                     const at::Tensor& a, bool bias) {
  const Letters size =
      check("low_rank_scores", "s[Q,B]|[Q,B,T] L[Q,O,K] R[Q,K,J] g[B,T,O] a[B,T,I]",
            {s, L, R, g, a}, bias);
  if (s.numel() == 0 || size.K == 0 || size.T == 0) return;
  const c10::DeviceGuard guard(g.device());
  // The kernel counts on a rank that is a power of two; the rank is one already nearly always.
  int log_rank = 3;
  while (int64_t{1} << log_rank < size.K) log_rank++;
  const int64_t rank = int64_t{1} << log_rank, N = size.B * size.T, more = rank - size.K;
  const at::Tensor left = aligned(more ? at::constant_pad_nd(L, {0, more}) : L);
  const at::Tensor right = aligned(
      (more ? at::constant_pad_nd(R, {0, 0, 0, more}) : R).reshape({size.Q * rank, size.J}));
  const at::Tensor gs = aligned(g.reshape({N, size.O})), as = aligned(a.reshape({N, size.I}));
  by_dtype(g, [&]<class E>(E) {
    const Columns<E> columns{data<E>(left),
                             left.stride(0),
                             left.stride(1),
                             static_cast<int>(size.Q),
                             static_cast<int>(size.O),
                             log_rank};
    auto run = [&]<class Tiling>(Tiling) {
      const at::Tensor sums = at::empty({size.Q, N, cdiv(rank, Tiling::N)}, s.options());
      launch(low_rank_scores_kernel<Tiling, E>, cdiv(N, Tiling::M) * cdiv(size.Q * rank, Tiling::N),
             Tiling::threads, Tiling::shared, matrix<E>(gs), matrix<E>(as, bias), columns,
             matrix<E>(right), sums.mutable_data_ptr<float>());
      fold(s, sums);
    };
    wide(N, size.Q * rank, 1) ? run(WideRows{}) : run(SmallRows{});
  });
}

}  // namespace
}  // namespace ekfac_fast::cuda

TORCH_LIBRARY_FRAGMENT(ekfac_fast_cuda, m) {
  ekfac_fast::cuda::beside(m, "low_rank_scores", &ekfac_fast::cuda::low_rank_scores);
}
