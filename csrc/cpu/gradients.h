// Per-sequence gradients in the eigenbasis, tile by tile: the loop that three ops share.
#pragma once

#include <c10/util/string_view.h>

#include <optional>
#include <string>

#include "../check.h"
#include "gemm.h"

namespace ekfac_fast {

// x [.., F] times Q [F', F'] by rows, plus Q's last row where `bias`; in the dtype products use.
at::Tensor rotate_tokens(const at::Tensor& x, const at::Tensor& Q, bool bias);
// sum_t g_bt (a_bt, 1)^T of one sequence, in the dtype products use.
at::Tensor one_gradient(const at::Tensor& g, const at::Tensor& a, bool bias);

// How many sequences are packed at a time: a slab of the wider side.
int64_t sequences_at_once(const Letters& size);

// ending(b, o0, o, j0, j, tile, ld, index) for every tile of every Qg^T G_b Qa. Tiles of one index
// run on one thread in the order of b, so an ending may accumulate over b.
template <class Acc, class Ending>
void gradient_tiles(const at::Tensor& g, const at::Tensor& a, const std::optional<at::Tensor>& Qg,
                    const std::optional<at::Tensor>& Qa, bool bias, const Letters& size,
                    const std::optional<c10::string_view>& forced, const Ending& ending) {
  if (size.B == 0 || size.O == 0 || size.J == 0) return;
  const Order order = contraction_order(size, forced);
  const bool a_late = Qa && !order.a_tokens, g_late = Qg && !order.g_tokens;
  if (a_late || g_late) {
    // One gradient at a time: the last rotation is the product that the ending closes.
    const std::optional<Panels> left =
        g_late ? std::optional(pack_rows(Qg->t().unsqueeze(0))) : std::nullopt;
    const std::optional<Panels> right =
        a_late && !g_late ? std::optional(pack_columns(Qa->unsqueeze(0))) : std::nullopt;
    for (int64_t b = 0; b < size.B; b++) {
      at::Tensor g_b = g.narrow(0, b, 1), a_b = a.narrow(0, b, 1);
      if (Qg && !g_late) g_b = rotate_tokens(g_b, *Qg, false);
      if (Qa && !a_late) a_b = rotate_tokens(a_b, *Qa, bias);
      at::Tensor G = one_gradient(g_b, a_b, bias && (!Qa || a_late));
      if (a_late && g_late) G = rotate_tokens(G, *Qa, false);
      auto at_b = [&](int64_t, auto... tile) { ending(b, tile...); };
      if (g_late) {
        product<Acc>(*left, pack_columns(G), at_b);
      } else {
        product<Acc>(pack_rows(G), *right, at_b);
      }
    }
    return;
  }
  const int64_t step = sequences_at_once(size);
  for (int64_t b0 = 0; b0 < size.B; b0 += step) {
    const int64_t n = std::min(step, size.B - b0);
    at::Tensor g_n = g.narrow(0, b0, n), a_n = a.narrow(0, b0, n);
    if (Qg) g_n = rotate_tokens(g_n, *Qg, false);
    if (Qa) a_n = rotate_tokens(a_n, *Qa, bias);
    product<Acc>(pack_rows(g_n.mT()), pack_columns(a_n, bias && !Qa),
                 [&](int64_t b, auto... tile) { ending(b0 + b, tile...); });
  }
}

}  // namespace ekfac_fast
