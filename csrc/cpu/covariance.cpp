// cov += x^T diag(mask) x: tiles on and above the diagonal, each added to both triangles.
#include <ATen/ops/addmm.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/nonzero.h>
#include <torch/library.h>

#include "../check.h"
#include "endings.h"
#include "gemm.h"

namespace ekfac_fast::cpu {
namespace {

template <class Acc>
void add_tile(Acc* cov, int64_t J, int64_t m0, int64_t m, int64_t n0, int64_t n, const Acc* C,
              int64_t ld) {
  for (int64_t i = 0; i < m; i++) add(cov + (m0 + i) * J + n0, C + i * ld, n);
  if (m0 == n0) return;  // a tile on the diagonal is both triangles
  if constexpr (std::is_same_v<Acc, float>) {
    alignas(64) Acc turned[kLanes * kTile];
    for (int64_t k0 = 0; k0 < n; k0 += kLanes) {
      const int64_t k1 = std::min(k0 + kLanes, n);
      transpose(turned, kTile, C + k0, ld, m, k1 - k0);
      for (int64_t k = k0; k < k1; k++) add(cov + (n0 + k) * J + m0, turned + (k - k0) * kTile, m);
    }
  } else {
    for (int64_t k = 0; k < n; k++) {
      for (int64_t i = 0; i < m; i++) cov[(n0 + k) * J + m0 + i] += C[i * ld + k];
    }
  }
}

// Whether the whole square is the library's: as one tile it is no triangle, and of few rows both
// triangles take longer to add than to multiply. Of fp32 alone: a 16-bit result would be rounded.
bool library_multiplies(const at::Tensor& x, int64_t N, int64_t J) {
  return x.scalar_type() == at::kFloat && compute_dtype(at::kFloat) == at::kFloat &&
         (J <= kTile + kLanes || N <= 2 * kLanes);
}

void library_accumulate(at::Tensor& cov, const at::Tensor& x, const at::Tensor& rows, bool bias) {
  const int64_t N = rows.defined() ? rows.numel() : x.size(0), step = slab_lines(x.size(1));
  for (int64_t r = 0; r < N; r += step) {
    const int64_t n = std::min(step, N - r);
    at::Tensor part = rows.defined() ? x.index_select(0, rows.narrow(0, r, n)) : x.narrow(0, r, n);
    if (bias) part = at::constant_pad_nd(part, {0, 1}, 1);
    cov.addmm_(part.t(), part);
  }
}

template <class Acc>
void accumulate(at::Tensor& cov, const at::Tensor& x, const at::Tensor& rows, bool bias) {
  at::Tensor sum = cov.contiguous();
  Acc* data = sum.mutable_data_ptr<Acc>();
  const int64_t J = sum.size(0), N = rows.defined() ? rows.numel() : x.size(0);
  const int64_t step = slab_lines(J);
  for (int64_t r = 0; r < N; r += step) {
    const int64_t n = std::min(step, N - r);
    const at::Tensor pick = rows.defined() ? rows.narrow(0, r, n) : rows;
    const at::Tensor part = (rows.defined() ? x : x.narrow(0, r, n)).unsqueeze(0);
    product<Acc>(
        pack_rows(part.mT(), {bias, pick}), pack_columns(part, J, {bias, pick}),
        [&](int64_t, int64_t m0, int64_t m, int64_t n0, int64_t n, const Acc* C, int64_t ld,
            int64_t) { add_tile(data, J, m0, m, n0, n, C, ld); },
        /*parts=*/1, /*upper=*/true);
  }
  if (!sum.is_same(cov)) cov.copy_(sum);
}

void covariance(at::Tensor& cov, const at::Tensor& x, const std::optional<at::Tensor>& mask,
                bool bias) {
  const Letters size = check("covariance", "cov[J,J] x[N,I] mask[N]", {cov, x, mask}, bias);
  if (size.J == 0) return;
  // Masked rows are never read: their products are saved, and a NaN in them cannot spread.
  const at::Tensor rows = mask ? at::nonzero(*mask).flatten().contiguous() : at::Tensor();
  if (library_multiplies(x, rows.defined() ? rows.numel() : size.N, size.J)) {
    library_accumulate(cov, x, rows, bias);
  } else if (x.scalar_type() == at::kDouble) {
    accumulate<double>(cov, x, rows, bias);
  } else {
    accumulate<float>(cov, x, rows, bias);
  }
}

}  // namespace
}  // namespace ekfac_fast::cpu

TORCH_LIBRARY_IMPL(ekfac_fast, CPU, m) { m.impl("covariance", &ekfac_fast::cpu::covariance); }
