// Per-sequence gradients in the eigenbasis, tile by tile: the loop that three ops share.
#pragma once

#include <ATen/ops/bmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/util/string_view.h>

#include <optional>
#include <string>
#include <utility>

#include "../check.h"
#include "gemm.h"

namespace ekfac_fast::cpu {

// x [.., F] times Q [F', F'] by rows, plus Q's last row where `bias`; in the dtype products use.
at::Tensor rotate_tokens(const at::Tensor& x, const at::Tensor& Q, bool bias);
// Whether gradients of J columns are the library's product, rounded to the operands' dtype: narrow
// ones, and any of bf16, where packing both sides takes longer than its product.
bool library_forms(const at::Tensor& g, const at::Tensor& a, int64_t J);
// x [..,F] and ones [..,1] beside it.
at::Tensor with_ones(const at::Tensor& x);
// sum_t g_bt (a_bt, 1)^T of every sequence, [B,O,J], in the dtype products use.
at::Tensor unrotated_gradients(const at::Tensor& g, const at::Tensor& a, bool bias);

// Tiles of one gradient.
inline int64_t tiles(const Letters& size) {
  return ceil_div(size.O, kTile) * ceil_div(size.J, kTile);
}

// A tile whose rows follow each other, `ld` apart here and `ldy` there, is one long row.
inline void join_rows(int64_t& rows, int64_t& columns, int64_t ld, int64_t ldy) {
  if (columns == ld && columns == ldy) columns *= std::exchange(rows, 1);
}

// How many sequences are packed at a time: a slab of the wider side. Where whole gradients are
// rotated, as many as a few MiB hold of them.
int64_t sequences_at_once(const Letters& size, bool whole);

// G_b B of every G [n,O,J], those of few rows one on top of the other: each meets B as it passes.
template <class Acc, class Ending>
void stacked_product(const at::Tensor& G, const Panels& B, const Ending& ending, int64_t parts) {
  const int64_t n = G.size(0), O = G.size(1), most = std::clamp<int64_t>(kTile / O, 1, n);
  for (int64_t b0 = 0; b0 < n; b0 += n / most * most) {
    const int64_t high = std::min(most, n - b0), stacks = (n - b0) / high;
    const at::Tensor rows = G.narrow(0, b0, stacks * high).view({stacks, high * O, G.size(2)});
    product<Acc>(
        pack_rows(rows), B,
        [&](int64_t stack, int64_t o0, int64_t o, int64_t j0, int64_t j, const Acc* C, int64_t ld,
            int64_t index) {
          if (high == 1) return ending(b0 + stack, o0, o, j0, j, C, ld, index);
          for (int64_t b = 0; b < high; b++) {
            ending(b0 + stack * high + b, 0, O, j0, j, C + b * O * ld, ld, index);
          }
        },
        parts);
  }
}

// The same of so few rows of 16 bits that Q [J,J] is packed where they meet it, O at most a tile.
template <class Ending>
void passing_product(const at::Tensor& G, const at::Tensor& Q, const Ending& ending) {
  const int64_t n = G.size(0), O = G.size(1), most = kTile / O;
  const Panels rows = pack_rows(G.view({1, n * O, G.size(2)}), {.width = most * O});
  const Matrix right(Q.unsqueeze(0), 2, 1, 0, 0);
  const Passing product{rows, right, Q.size(0), Q.size(1)};
  auto close = [&](int64_t i, int64_t m, int64_t j, int64_t n0, int64_t columns, const float* C,
                   int64_t ld) {
    for (int64_t b = 0; b < m / O; b++) {
      ending(i * most + b, 0, O, n0, columns, C + b * O * ld, ld, j);
    }
  };
  at::parallel_for(0, product.count, grain(rows.extent * product.span * product.depth),
                   [&](int64_t begin, int64_t end) { product(begin, end, close); });
}

// What `product` does, of fp32 matrices [n,M,K] and [n,K,N] that the library reads as they lie, n 1
// where it is the same for every sequence: squares that stay in the last-level cache, of as many
// sequences as fill one.
template <class Ending>
void library_product(const at::Tensor& A, const at::Tensor& B, const Ending& ending,
                     int64_t parts) {
  constexpr int64_t kSquare = 4 * kTile;
  const int64_t M = A.size(1), N = B.size(2), batch = std::max(A.size(0), B.size(0));
  const int64_t m = std::min(M, kSquare), n = std::min(N, kSquare);
  const int64_t most = std::clamp<int64_t>(kSquare * kSquare / (m * n), 1, batch);
  parts = std::min(parts, batch);
  // Endings that sum over no sequences leave it to us how many are a part; little work is one.
  const bool little = M * N * A.size(2) * batch <= int64_t{1} << 25;
  if (parts == batch || little) parts = ceil_div(batch, most);
  const int64_t part = ceil_div(batch, parts), across = ceil_div(N, kSquare);
  const int64_t squares = ceil_div(M, kSquare) * across;
  const int64_t tiles = ceil_div(M, kTile) * ceil_div(N, kTile);
  const bool stacked = B.size(0) == 1 && M <= kSquare && A.stride(0) == M * A.stride(1);
  at::parallel_for(
      0, parts * squares, grain(m * n * A.size(2) * part), [&](int64_t begin, int64_t end) {
        Tile<float> C(most * m * n);
        for (int64_t unit = begin; unit < end; unit++) {
          const int64_t square = unit % squares, p = unit / squares;
          const int64_t m0 = square / across * kSquare, n0 = square % across * kSquare;
          const int64_t high = std::min(kSquare, M - m0), wide = std::min(kSquare, N - n0);
          for (int64_t b = p * part, some; b < std::min(batch, (p + 1) * part); b += some) {
            some = std::min({most, batch - b, (p + 1) * part - b});
            auto of = [&](const at::Tensor& x) {
              return x.size(0) == 1 ? x.expand({some, -1, -1}) : x.narrow(0, b, some);
            };
            const at::Tensor left = of(A).narrow(1, m0, high), right = of(B).narrow(2, n0, wide);
            at::Tensor out = at::from_blob(C.data, {some, high, wide}, at::dtype(at::kFloat));
            if (some == 1) {
              at::Tensor only = out[0];
              at::mm_out(only, left[0], right[0]);
            } else if (stacked) {
              at::Tensor rows = out.view({some * high, wide});
              at::mm_out(rows, left.view({some * high, -1}), right[0]);
            } else {
              at::bmm_out(out, left, right);
            }
            for (int64_t k = 0; k < some; k++) {
              for (int64_t i = 0; i < high; i += kTile) {
                for (int64_t j = 0; j < wide; j += kTile) {
                  const int64_t tile = (m0 + i) / kTile * ceil_div(N, kTile) + (n0 + j) / kTile;
                  ending(b + k, m0 + i, std::min(kTile, high - i), n0 + j,
                         std::min(kTile, wide - j), C.data + (k * high + i) * wide + j, wide,
                         p * tiles + tile);
                }
              }
            }
          }
        }
      });
}

// `product` of matrices [n,M,K] and [n,K,N] by whichever is the fastest.
template <class Acc, class Ending>
void fastest_product(const at::Tensor& A, const at::Tensor& B, const Ending& ending,
                     int64_t parts) {
  if constexpr (std::is_same_v<Acc, float>) {
    if (library_is_fastest(A.scalar_type())) return library_product(A, B, ending, parts);
  }
  product<Acc>(pack_rows(A), pack_columns(B, A.size(1)), ending, parts);
}

// The squares [B,O] and [B,J] of both sides in the eigenbasis where sequences are of one token: a
// gradient is then an outer product, and its square that of the squares. Undefined otherwise.
std::pair<at::Tensor, at::Tensor> squared_sides(const at::Tensor& g, const at::Tensor& a,
                                                const std::optional<at::Tensor>& Qg,
                                                const std::optional<at::Tensor>& Qa, bool bias,
                                                const Letters& size,
                                                const std::optional<c10::string_view>& forced);

// ending(b, o0, o, j0, j, tile, ld, index) for every tile of every Qg^T G_b Qa. Sequences are cut
// into `parts`; tiles of one index run on one thread in the order of b, so an ending may accumulate
// over b; index = part x tiles + tile.
template <class Acc, class Ending>
void gradient_tiles(const at::Tensor& g, const at::Tensor& a, const std::optional<at::Tensor>& Qg,
                    const std::optional<at::Tensor>& Qa, bool bias, const Letters& size,
                    const std::optional<c10::string_view>& forced, int64_t parts,
                    const Ending& ending) {
  if (size.B == 0 || size.O == 0 || size.J == 0) return;
  const Order order = contraction_order(size, forced);
  const bool a_late = Qa && !order.a_tokens, g_late = Qg && !order.g_tokens;
  const int64_t step = sequences_at_once(size, a_late || g_late);
  const bool library = library_is_fastest(g.scalar_type());
  std::optional<Panels> left, right;
  if (g_late && !library) left = pack_rows(Qg->t().unsqueeze(0));
  const bool passing = a_late && !g_late && Qa->element_size() == 2 && size.O <= kTile &&
                       std::min(step, size.B) * size.O <= kFew;
  if (a_late && !g_late && !passing && !library) {
    right = pack_columns(Qa->unsqueeze(0), std::min(step, size.B) * size.O);
  }
  for (int64_t b0 = 0; b0 < size.B; b0 += step) {
    const int64_t n = std::min(step, size.B - b0);
    auto from = [&](int64_t b, auto... tile) { ending(b0 + b, tile...); };
    at::Tensor g_n = g.narrow(0, b0, n), a_n = a.narrow(0, b0, n);
    if (Qg && !g_late) g_n = rotate_tokens(g_n, *Qg, false);
    if (Qa && !a_late) a_n = rotate_tokens(a_n, *Qa, bias);
    const bool ones = bias && (!Qa || a_late);
    if (!a_late && !g_late) {
      if constexpr (std::is_same_v<Acc, float>) {
        // Of few tokens a tile costs less than the call, but for many small gradients it is one
        // call.
        const int64_t least = size.O * size.J <= kTile * kTile ? kBlock / 4 : kBlock;
        if (library && !ones && size.T >= least) {
          library_product(g_n.mT(), a_n, from, parts);
          continue;
        }
      }
      product<Acc>(pack_rows(g_n.mT()), pack_columns(a_n, size.O, {.ones = ones}), from, parts);
      continue;
    }
    // The last rotation is the product that the ending closes.
    at::Tensor G = unrotated_gradients(g_n, a_n, ones);
    if (g_late) {
      if (a_late) G = rotate_tokens(G, *Qa, false);
      if constexpr (std::is_same_v<Acc, float>) {
        if (library) {
          library_product(Qg->t().unsqueeze(0), G, from, parts);
          continue;
        }
      }
      product<Acc>(*left, pack_columns(G, size.O), from, parts);
    } else if (passing) {
      if constexpr (std::is_same_v<Acc, float>) passing_product(G, *Qa, from);
    } else if (library) {
      if constexpr (std::is_same_v<Acc, float>) library_product(G, Qa->unsqueeze(0), from, parts);
    } else {
      stacked_product<Acc>(G, *right, from, parts);
    }
  }
}

}  // namespace ekfac_fast::cpu
