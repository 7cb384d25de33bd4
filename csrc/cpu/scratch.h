// Memory of packed operands, intermediate products and preconditioned gradients, kept between
// calls.
#pragma once

#include <ATen/core/Tensor.h>

namespace ekfac_fast::cpu {

// An uninitialised CPU tensor whose memory is kept for the next call when the tensor is gone, up to
// kKept bytes in all. malloc gives freed memory of this size back to the system, and faulting the
// same pages in again took 8 % of a call (`eigenvalues`, 768 x 3072, T=512, two threads).
at::Tensor scratch(at::IntArrayRef sizes, at::ScalarType dtype);

constexpr int64_t kKept = int64_t{192} << 20;

}  // namespace ekfac_fast::cpu
