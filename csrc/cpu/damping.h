// Division by lam + damping [O,J], of which every sequence's gradient wants the same.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>

#include "endings.h"
#include "scratch.h"

namespace ekfac_fast::cpu {

// A division takes several times as long as a product: of more than one sequence the reciprocals
// are made once, unless one of them is out of range.
template <class Acc>
class Damping {
 public:
  Damping(const at::Tensor& lam, double damping, int64_t sequences)
      : values_(lam.contiguous()), damping_(static_cast<Acc>(damping)) {
    if (sequences < 2) return;
    reciprocals_ = scratch(values_.sizes(), values_.scalar_type());
    if (!make(reciprocals_.mutable_data_ptr<Acc>())) reciprocals_.reset();
  }

  // 1 / (lam + damping), or undefined.
  const at::Tensor& reciprocals() const { return reciprocals_; }

  // sum x^2 / (lam + damping) over m rows of n, from element `at` of lam on.
  Acc norm(const Acc* x, int64_t ld, int64_t at, int64_t m, int64_t n) const {
    const int64_t J = values_.size(1);
    return reciprocals_.defined()
               ? weighted_norm(x, ld, reciprocals_.const_data_ptr<Acc>() + at, J, m, n)
               : damped_norm(x, ld, values_.const_data_ptr<Acc>() + at, J, damping_, m, n);
  }

  // y = x / (lam + damping), from element `at` of lam on.
  void divide(Acc* y, const Acc* x, int64_t at, int64_t n) const {
    reciprocals_.defined() ? multiply(y, x, reciprocals_.const_data_ptr<Acc>() + at, n)
                           : cpu::divide(y, x, values_.const_data_ptr<Acc>() + at, damping_, n);
  }

 private:
  bool make(Acc* to) const {
    const Acc* lam = values_.const_data_ptr<Acc>();
    const int64_t J = values_.size(1),
                  grain = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, J));
    std::atomic<bool> finite{true};
    at::parallel_for(0, values_.size(0), grain, [&](int64_t begin, int64_t end) {
      const int64_t at = begin * J;
      if (!cpu::reciprocals(to + at, lam + at, damping_, (end - begin) * J)) finite = false;
    });
    return finite;
  }

  at::Tensor values_, reciprocals_;
  Acc damping_;
};

}  // namespace ekfac_fast::cpu
