// Operands as the kernels want them: rows at multiples of 16 bytes, rotated by ATen's products.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>

#include "../check.h"

namespace ekfac_fast::cuda {

// x, or a copy with padded rows, such that every row starts at a multiple of 16 bytes.
at::Tensor aligned(const at::Tensor& x);

// Calls use(first, x, y) with aligned x [b,T,O], y [b,T,J] for which sum_t x_t y_t^T is Qg^T G_b Qa
// of the sequences from `first` on. Sides rotated by tokens are rotated before; the last rotation
// of a gradient is itself such a sum, its "tokens" being the rows of the eigenvectors. Then
// gradients are formed a few sequences at a time, else all are one call.
void rotated(const at::Tensor& g, const at::Tensor& a, const std::optional<at::Tensor>& Qg,
             const std::optional<at::Tensor>& Qa, bool bias, const Letters& size,
             const std::optional<c10::string_view>& forced,
             const std::function<void(int64_t, const at::Tensor&, const at::Tensor&)>& use);

}  // namespace ekfac_fast::cuda
