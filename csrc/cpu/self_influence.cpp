// s_b += sum (Qg^T G_b Qa)^2 / (lam + damping): a tile becomes one number where it was computed.
#include <torch/library.h>

#include <atomic>
#include <utility>
#include <vector>

#include "endings.h"
#include "gradients.h"
#include "scratch.h"

namespace ekfac_fast::cpu {
namespace {

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

void self_influence(at::Tensor& s, const at::Tensor& g, const at::Tensor& a,
                    const std::optional<at::Tensor>& Qg, const std::optional<at::Tensor>& Qa,
                    const at::Tensor& lam, double damping, bool bias,
                    std::optional<c10::string_view> order) {
  const Letters size = check("self_influence", "s[B] g[B,T,O] a[B,T,I] Qg[O,O] Qa[J,J] lam[O,J]",
                             {s, g, a, Qg, Qa, lam}, bias, damping, order);
  auto run = [&]<class Acc>(Acc) {
    const Damping<Acc> damped(lam, damping, size.B);
    // One partial sum a tile, added up in fixed order: the result never depends on which thread was
    // first.
    int64_t count = tiles(size);
    std::vector<double> sums(size.B * count, 0.0);
    std::pair<at::Tensor, at::Tensor> squares;
    if (damped.reciprocals().defined()) squares = squared_sides(g, a, Qg, Qa, bias, size, order);
    if (const auto& [outputs, inputs] = squares; outputs.defined()) {
      // sum_oj u_o^2 v_j^2 w_oj: rows of u^2 W meet those of v^2.
      count = ceil_div(size.J, kTile);
      const Acc* v = inputs.template const_data_ptr<Acc>();
      fastest_product<Acc>(
          outputs.unsqueeze(0), damped.reciprocals().unsqueeze(0),
          [&](int64_t, int64_t b0, int64_t some, int64_t j0, int64_t j, const Acc* C, int64_t ld,
              int64_t index) {
            for (int64_t b = b0; b < b0 + some; b++, C += ld) {
              sums[b * count + index % count] = dot(C, v + b * size.J + j0, j);
            }
          },
          1);
    } else {
      gradient_tiles<Acc>(g, a, Qg, Qa, bias, size, order, size.B,
                          [&](int64_t b, int64_t o0, int64_t o, int64_t j0, int64_t j, const Acc* C,
                              int64_t ld, int64_t index) {
                            join_rows(o, j, ld, size.J);
                            sums[b * count + index % count] =
                                damped.norm(C, ld, o0 * size.J + j0, o, j);
                          });
    }
    Acc* out = s.mutable_data_ptr<Acc>();
    for (int64_t b = 0; b < size.B; b++) {
      double sum = 0;
      for (int64_t tile = 0; tile < count; tile++) sum += sums[b * count + tile];
      out[b * s.stride(0)] += static_cast<Acc>(sum);
    }
  };
  g.scalar_type() == at::kDouble ? run(double{}) : run(float{});
}

}  // namespace
}  // namespace ekfac_fast::cpu

TORCH_LIBRARY_IMPL(ekfac_fast, CPU, m) {
  m.impl("self_influence", &ekfac_fast::cpu::self_influence);
}
