#include "gemm.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>

#include "isa.h"

namespace ekfac_fast::cpu {

at::ScalarType compute_dtype(at::ScalarType dtype) {
  if (dtype == at::kDouble) return at::kDouble;
  const bool lowered = dtype == at::kFloat && at::globalContext().float32MatmulPrecision() ==
                                                  at::Float32MatmulPrecision::MEDIUM;
  return has_bf16_products() && (dtype == at::kBFloat16 || lowered) ? at::kBFloat16 : at::kFloat;
}

bool library_multiplies(int64_t rows, int64_t depth, int64_t columns, at::ScalarType dtype) {
  return dtype == at::kBFloat16 && has_bf16_products() &&
         ((rows <= kFew && rows <= depth) || columns <= kTile / 2 ||
          (depth % 2 == 1 && 2 * depth > columns));
}

bool library_is_fastest(at::ScalarType dtype) {
  static const bool here = has_avx2() && (!has_avx512() || is_intel()) && at::hasMKL();
  return dtype == at::kFloat && here;
}

void multiply_add(at::ScalarType dtype, int64_t M, int64_t N, int64_t K, const void* x, int64_t lda,
                  const void* y, int64_t ldb, float* C, int64_t ldc, bool add) {
  namespace blas = at::native::cpublas;
  if (dtype == at::kBFloat16) {
    blas::brgemm(M, N, K, lda, ldb, ldc, add, static_cast<const at::BFloat16*>(x),
                 static_cast<const at::BFloat16*>(y), C, true);
  } else {
    blas::brgemm(M, N, K, lda, ldb, ldc, add, static_cast<const float*>(x),
                 static_cast<const float*>(y), C, false);
  }
}

template <class Acc>
void multiply(const Panels& A, int64_t a, int64_t i, const Panels& B, int64_t b, int64_t j, Acc* C,
              int64_t ldc) {
  const int64_t M = A.size(i), N = B.size(j), depth = std::min(A.padded_depth, B.padded_depth);
  for (int64_t m = 0; depth == 0 && m < M; m++) std::fill_n(C + m * ldc, N, Acc(0));
  for (int64_t k = 0, chunk = 0; k < depth; k += kDepth, chunk++) {
    const int64_t K = std::min(kDepth, depth - k), lda = A.ld(chunk), ldb = B.ld(chunk);
    const void *x = A.at(a, i, chunk), *y = B.at(b, j, chunk);
    if constexpr (std::is_same_v<Acc, double>) {
      auto wrap = [](const void* data, int64_t rows, int64_t columns, int64_t ld) {
        return at::from_blob(const_cast<void*>(data), {rows, columns}, {ld, 1},
                             at::dtype(at::kDouble));
      };
      at::Tensor out = wrap(C, M, N, ldc);
      at::addmm_out(out, out, wrap(x, M, K, lda), wrap(y, K, N, ldb), k > 0);
    } else {
      multiply_add(A.storage.scalar_type(), M, N, K, x, lda, y, ldb, C, ldc, k > 0);
    }
  }
}

template void multiply(const Panels&, int64_t, int64_t, const Panels&, int64_t, int64_t, float*,
                       int64_t);
template void multiply(const Panels&, int64_t, int64_t, const Panels&, int64_t, int64_t, double*,
                       int64_t);

void release(const Panels& A) {
  const auto dtype = A.storage.scalar_type();
  if (dtype != at::kDouble) at::native::cpublas::brgemm_release(dtype == at::kBFloat16);
}

}  // namespace ekfac_fast::cpu
