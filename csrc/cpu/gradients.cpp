#include "gradients.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>

#include "endings.h"
#include "scratch.h"

namespace ekfac_fast::cpu {

// Of gradients that are rotated whole: enough for layers so small that one is not worth its calls.
constexpr int64_t kGradientBytes = int64_t{4} << 20;

int64_t sequences_at_once(const Letters& size, bool whole) {
  if (whole) return std::max<int64_t>(1, kGradientBytes / (4 * size.O * size.J));
  return std::max<int64_t>(
      1, kSlabBytes / (4 * std::max<int64_t>(1, size.T * std::max(size.O, size.J))));
}

bool library_forms(const at::Tensor& g, const at::Tensor& a, int64_t J) {
  const auto dtype = g.scalar_type();
  return dtype == a.scalar_type() && dtype == compute_dtype(dtype) &&
         (dtype == at::kBFloat16 || library_is_fastest(dtype) ||
          (dtype == at::kFloat && (J <= kNarrow || g.size(2) * J <= 8192)));
}

namespace {

// Columns [at, at + B.extent) of y [batch, m, n] = A B + bias [n].
void multiply_into(at::Tensor& y, int64_t at, const Panels& A, const Panels& B,
                   const at::Tensor& bias) {
  const int64_t M = A.extent, N = y.size(2), batch = std::max(A.batch, B.batch);
  auto run = [&]<class Out, class Acc>(Out, Acc) {
    Out* data = y.mutable_data_ptr<Out>() + at;
    const Acc* row = bias.defined() ? bias.const_data_ptr<Acc>() + at : nullptr;
    const int64_t tiles = A.count * B.count;
    at::parallel_for(
        0, batch * tiles, grain(A.width * B.width * A.depth), [&](int64_t begin, int64_t end) {
          Tile<Acc> room(std::is_same_v<Out, Acc> ? 0 : A.width * B.line);
          for (int64_t unit = begin; unit < end; unit++) {
            const int64_t b = unit / tiles, i = unit % tiles / B.count, j = unit % B.count;
            Out* to = data + (b * M + A.begin(i)) * N + B.begin(j);
            Acc* C = room.data;
            int64_t ld = B.line;
            if constexpr (std::is_same_v<Out, Acc>) {
              C = to;
              ld = N;
            }
            multiply<Acc>(A, b, i, B, b, j, C, ld);
            for (int64_t r = 0; r < A.size(i); r++) {
              if (row) add(C + r * ld, row + B.begin(j), B.size(j));
              if constexpr (!std::is_same_v<Out, Acc>) convert(to + r * N, C + r * ld, B.size(j));
            }
          }
          release(A);
        });
  };
  switch (y.scalar_type()) {
    case at::kDouble: run(double{}, double{}); break;
    case at::kBFloat16: run(at::BFloat16{}, float{}); break;
    default: run(float{}, float{});
  }
}

}  // namespace

at::Tensor rotate_tokens(const at::Tensor& x, const at::Tensor& Q, bool bias) {
  const int64_t F = x.size(-1);
  // The library's product of bf16 is as fast as ours, and packs neither side.
  if ((x.scalar_type() == at::kBFloat16 && compute_dtype(at::kBFloat16) == at::kBFloat16) ||
      (library_is_fastest(x.scalar_type()) && Q.scalar_type() == x.scalar_type())) {
    const at::Tensor head = Q.narrow(0, 0, F), last = bias ? Q.select(0, F) : at::Tensor();
    at::Tensor y = scratch({x.size(0), x.size(1), Q.size(1)}, x.scalar_type());
    // Sequences that lie turned are multiplied so, but where Q would be read often for few tokens.
    if (x.stride(1) == 1 && x.stride(2) > 1 && (x.size(1) >= 2 * kBlock || F <= 2 * kBlock)) {
      const at::Tensor every = head.expand({x.size(0), -1, -1});
      bias ? at::baddbmm_out(y, last, x, every) : at::bmm_out(y, x, every);
    } else {
      at::Tensor y2 = y.flatten(0, 1);
      const at::Tensor x2 = x.flatten(0, 1);
      bias ? at::addmm_out(y2, last, x2, head) : at::mm_out(y2, x2, head);
    }
    return y;
  }
  const auto wide = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor last = bias ? Q.select(0, F).to(wide).contiguous() : at::Tensor();
  const Panels A = pack_rows(x.reshape({1, -1, F}));
  at::Tensor y = scratch({1, A.extent, Q.size(1)}, A.storage.scalar_type());
  const int64_t step = slab_lines(F);
  for (int64_t n = 0; n < Q.size(1); n += step) {
    const at::Tensor slab = Q.narrow(0, 0, F).narrow(1, n, std::min(step, Q.size(1) - n));
    multiply_into(y, n, A, pack_columns(slab.unsqueeze(0), A.extent), last);
  }
  return y.view({x.size(0), x.size(1), Q.size(1)});
}

at::Tensor with_ones(const at::Tensor& x) {
  std::vector<int64_t> sizes = x.sizes().vec(), column = sizes;
  sizes.back()++;
  column.back() = 1;
  at::Tensor y = scratch(sizes, x.scalar_type());
  at::cat_out(y, {x, at::ones(column, x.options())}, -1);
  return y;
}

at::Tensor unrotated_gradients(const at::Tensor& g, const at::Tensor& a, bool bias) {
  if (library_forms(g, a, a.size(2) + bias)) {
    at::Tensor G = scratch({g.size(0), g.size(2), a.size(2) + bias}, g.scalar_type());
    at::bmm_out(G, g.mT(), bias ? with_ones(a) : a);
    return G;
  }
  const Panels A = pack_rows(g.mT()), B = pack_columns(a, A.extent, {.ones = bias});
  at::Tensor G = scratch({A.batch, A.extent, B.extent}, A.storage.scalar_type());
  multiply_into(G, 0, A, B, {});
  return G;
}

std::pair<at::Tensor, at::Tensor> squared_sides(const at::Tensor& g, const at::Tensor& a,
                                                const std::optional<at::Tensor>& Qg,
                                                const std::optional<at::Tensor>& Qa, bool bias,
                                                const Letters& size,
                                                const std::optional<c10::string_view>& forced) {
  const Order order = contraction_order(size, forced);
  if (size.T != 1 || (Qg && !order.g_tokens) || (Qa && !order.a_tokens)) return {};
  const auto wide = g.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  auto squared = [&](const at::Tensor& x) { return x.squeeze(1).to(wide).square(); };
  return {squared(Qg ? rotate_tokens(g, *Qg, false) : g), squared(Qa ? rotate_tokens(a, *Qa, bias)
                                                                  : bias ? with_ones(a)
                                                                         : a)};
}

}  // namespace ekfac_fast::cpu
