// cov += x^T diag(mask) x: tiles on and above the diagonal, each added to both triangles.
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../check.h"
#include "endings.h"
#include "gemm.h"
#include "gradients.h"
#include "isa.h"

namespace ekfac_fast::cpu {
namespace {

constexpr int64_t kStreamed = 2 * kTile;  // features whose covariance stays in cache
constexpr int64_t kCopied = 1 << 18;      // elements that stay in cache beside a column of ones
constexpr int64_t kPart = 16 * kDepth;    // rows worth sums of their own

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
  if (x.scalar_type() != at::kFloat || compute_dtype(at::kFloat) != at::kFloat) return false;
  if (library_is_fastest(at::kFloat) && !has_avx512()) return J <= 3 * kTile || N <= kTile;
  return J <= kTile + kLanes || N <= 2 * kLanes;
}

void library_accumulate(at::Tensor& cov, const at::Tensor& x, const at::Tensor& rows, bool bias) {
  const int64_t N = rows.defined() ? rows.numel() : x.size(0), most = slab_lines(x.size(1));
  const int64_t step = bias ? std::clamp(kCopied / cov.size(0), kDepth, most) : most;
  for (int64_t r = 0; r < N; r += step) {
    const int64_t n = std::min(step, N - r);
    at::Tensor part = rows.defined() ? x.index_select(0, rows.narrow(0, r, n)) : x.narrow(0, r, n);
    if (bias) part = with_ones(part);
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

// Whether one covariance and a chunk of packed rows stay in the second-level cache.
bool stays_in_cache(const at::Tensor& x, int64_t J) {
  return compute_dtype(x.scalar_type()) == at::kBFloat16 && J <= kStreamed;
}

// Narrow bf16: rows stream past sums that stay, a chunk of them packed at a time; its words,
// turned, are the left operand. Parts depend on the shape alone, so results repeat.
void streamed(at::Tensor& cov, const at::Tensor& x, const at::Tensor& rows, bool bias) {
  const int64_t J = cov.size(0), I = x.size(1), N = rows.defined() ? rows.numel() : x.size(0);
  const int64_t parts = std::clamp<int64_t>(N / kPart, 1, 8), part = ceil_div(N, parts);
  const int64_t* pick = rows.defined() ? rows.const_data_ptr<int64_t>() : nullptr;
  at::Tensor sums = at::zeros({parts, J, J}, at::kFloat);
  const Matrix whole(x.unsqueeze(0), 2, 1, 0, 0);
  const Panels shape(true, 1, J, kDepth, at::kBFloat16, 0);
  at::parallel_for(0, parts, grain(part * J * J), [&](int64_t begin, int64_t end) {
    Panels right(true, 1, J, kDepth, at::kBFloat16, 0);
    Tile<at::BFloat16> left(right.count * right.line * kDepth);
    float* data = sums.mutable_data_ptr<float>();
    for (int64_t n = begin * part; n < std::min(N, end * part); n += right.depth) {
      const int64_t p = n / part;
      right.depth = std::min({kDepth, N - n, (p + 1) * part - n});
      right.padded_depth = round_up(right.depth, 2);
      for (int64_t j = 0; j < right.count; j++) {
        const int64_t lines = std::clamp<int64_t>(I - right.begin(j), 0, right.width);
        right.fill(0, j, lines, whole.from(right.begin(j), pick ? 0 : n),
                   bias && j + 1 == right.count, pick ? pick + n : nullptr, 0, right.padded_depth);
        transpose(left.data + right.begin(j) * kDepth, kDepth / 2, right.at(0, j, 0), right.line,
                  right.padded_depth / 2, right.size(j));
        for (int64_t i = 0; i <= j; i++) {
          multiply_add(at::kBFloat16, right.size(i), right.size(j), right.padded_depth,
                       left.data + right.begin(i) * kDepth, kDepth, right.at(0, j, 0), right.line,
                       data + (p * J + right.begin(i)) * J + right.begin(j), J);
        }
      }
    }
    release(right);
  });
  at::Tensor sum = cov.contiguous();
  const at::Tensor total = parts > 1 ? sums.sum(0) : sums;
  for (int64_t j = 0; j < shape.count; j++) {
    for (int64_t i = 0; i <= j; i++) {
      const int64_t m = shape.begin(i), n = shape.begin(j);
      add_tile(sum.mutable_data_ptr<float>(), J, m, shape.size(i), n, shape.size(j),
               total.const_data_ptr<float>() + m * J + n, J);
    }
  }
  if (!sum.is_same(cov)) cov.copy_(sum);
}

// Which rows take part: at::nonzero takes as long as the product of a few.
at::Tensor rows_of(const at::Tensor& mask) {
  const at::Tensor flags = mask.to(at::kBool).contiguous();
  const bool* set = flags.const_data_ptr<bool>();
  at::Tensor rows = at::empty({std::count(set, set + flags.numel(), true)}, at::kLong);
  int64_t* row = rows.mutable_data_ptr<int64_t>();
  for (int64_t n = 0; n < flags.numel(); n++) {
    if (set[n]) *row++ = n;
  }
  return rows;
}

void covariance(at::Tensor& cov, const at::Tensor& x, const std::optional<at::Tensor>& mask,
                bool bias) {
  const Letters size = check("covariance", "cov[J,J] x[N,I] mask[N]", {cov, x, mask}, bias);
  if (size.J == 0) return;
  // Masked rows are never read: their products are saved, and a NaN in them cannot spread.
  const at::Tensor rows = mask ? rows_of(*mask) : at::Tensor();
  if (library_multiplies(x, rows.defined() ? rows.numel() : size.N, size.J)) {
    library_accumulate(cov, x, rows, bias);
  } else if (stays_in_cache(x, size.J)) {
    streamed(cov, x, rows, bias);
  } else if (x.scalar_type() == at::kDouble) {
    accumulate<double>(cov, x, rows, bias);
  } else {
    accumulate<float>(cov, x, rows, bias);
  }
}

}  // namespace
}  // namespace ekfac_fast::cpu

TORCH_LIBRARY_IMPL(ekfac_fast, CPU, m) { m.impl("covariance", &ekfac_fast::cpu::covariance); }
