#include "rotations.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>

#include <algorithm>

namespace ekfac_fast::cuda {
namespace {

// Gradients formed at a time: what is written stays in L2.
constexpr int64_t kChunkBytes = int64_t{32} << 20;

// Not filled, last dimension dense, rows 16 bytes of 16-bit elements apart.
at::Tensor padded(std::vector<int64_t> sizes, const at::Tensor& like) {
  const int64_t width = sizes.back();
  sizes.back() = (width + 7) / 8 * 8;
  return at::empty(sizes, like.options()).narrow(-1, 0, width);
}

// (x, 1) Q without the ones column: x [b,T,I], Q [J,J] -> [b,T,J].
at::Tensor rotate(const at::Tensor& x, const at::Tensor& Q, bool bias) {
  const int64_t F = x.size(-1);
  const at::Tensor rows = x.reshape({-1, F});
  at::Tensor y = padded({rows.size(0), Q.size(1)}, x);
  if (bias)
    at::addmm_out(y, Q.select(0, F), rows, Q.narrow(0, 0, F));
  else
    at::mm_out(y, rows, Q);
  return y.unflatten(0, {x.size(0), x.size(1)});
}

// sum_t g_bt (a_bt, 1)^T: [b,O,J].
at::Tensor gradients(const at::Tensor& g, const at::Tensor& a, bool bias) {
  const int64_t I = a.size(2);
  at::Tensor G = padded({g.size(0), g.size(2), I + bias}, g), inputs = G.narrow(2, 0, I);
  at::bmm_out(inputs, g.mT(), a);
  if (bias) {
    at::Tensor last = G.select(2, I);
    at::sum_out(last, g, 1);
  }
  return G;
}

}  // namespace

at::Tensor aligned(const at::Tensor& x) {
  bool rows = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 && x.stride(-1) == 1;
  for (int64_t d = 0; d < x.dim() - 1; d++) rows &= x.stride(d) % 8 == 0;
  return rows ? x : padded(x.sizes().vec(), x).copy_(x);
}

void rotated(const at::Tensor& g, const at::Tensor& a, const std::optional<at::Tensor>& Qg,
             const std::optional<at::Tensor>& Qa, bool bias, const Letters& size,
             const std::optional<c10::string_view>& forced,
             const std::function<void(int64_t, const at::Tensor&, const at::Tensor&)>& use) {
  const Order order = contraction_order(size, forced);
  const bool g_late = Qg && !order.g_tokens, a_late = Qa && !order.a_tokens;
  const at::Tensor x = Qg && !g_late ? rotate(g, *Qg, false) : g;
  const at::Tensor y = Qa && !a_late ? rotate(a, *Qa, bias) : a;
  if (!g_late && !a_late) return use(0, aligned(x), aligned(y));
  const int64_t step = std::max<int64_t>(1, kChunkBytes / (2 * size.O * size.J));
  for (int64_t first = 0; first < size.B; first += step) {
    const int64_t n = std::min(step, size.B - first);
    const at::Tensor G = gradients(x.narrow(0, first, n), y.narrow(0, first, n), bias && a_late);
    if (!a_late) {
      use(first, aligned(*Qg).expand({n, size.O, size.O}), G);
    } else if (!g_late) {
      use(first, aligned(G.mT()), aligned(*Qa).expand({n, size.J, size.J}));
    } else {
      use(first, aligned(*Qg).expand({n, size.O, size.O}), rotate(G, *Qa, false));
    }
  }
}

}  // namespace ekfac_fast::cuda
