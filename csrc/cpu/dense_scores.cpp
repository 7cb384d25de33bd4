// s_qb += <P_q, G_b>: the product [Q,OJ] x [OJ,B], of which the right side is made a tile at a time
// and met by every query while it is in cache. Per token, g P_q meets a, tile by tile.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <utility>
#include <vector>

#include "../check.h"
#include "endings.h"
#include "gemm.h"

namespace ekfac_fast::cpu {
namespace {

// How gradients are cut: what a thread holds of them stays in the last-level cache.
struct Cut {
  int64_t rows, columns, sequences;
};
constexpr int64_t kColumns = 256, kHeldBytes = int64_t{4} << 20;
constexpr int64_t kBlocks = 64;  // partial sums at most
// From so many on of both, a product is faster than dot products.
constexpr int64_t kSequences = 8, kQueries = 12;

// Gradient tiles of a group of sequences, [o,n] of [O,J], `area` apart, and the scores they add to.
template <class Acc>
struct Held {
  const Acc* G;
  int64_t area, ld, b, sequences, o, m, j, n;
  Acc* sums;  // [B,Q]
};

// A few rows of P_q as dot products read them: in place if they are Acc already, else widened into
// `room`.
template <class Acc>
const Acc* query_rows(const at::Tensor& P, int64_t q, int64_t o, int64_t m, int64_t j, int64_t n,
                      Acc* room, int64_t& ld) {
  auto from = [&]<class In>(In) -> const Acc* {
    const In* data = P.const_data_ptr<In>() + q * P.stride(0) + o * P.stride(1) + j;
    if constexpr (std::is_same_v<In, Acc>) {
      ld = P.stride(1);
      return data;
    } else {
      ld = n;
      for (int64_t r = 0; r < m; r++) convert(room + r * n, data + r * P.stride(1), n);
      return room;
    }
  };
  if constexpr (std::is_same_v<Acc, double>)
    return from(double{});
  else if (P.scalar_type() == at::kBFloat16)
    return from(at::BFloat16{});
  else if (P.scalar_type() == at::kHalf)
    return from(at::Half{});
  else
    return from(float{});
}

// Many of both: the product [B,OJ] x [OJ,Q], a row of the tile at a time. Gradients are rows
// already; P is multiplied as it lies if queries are innermost, else turned on its way to the
// cache.
struct Product {
  const at::Tensor& P;
  at::ScalarType dtype = compute_dtype(P.scalar_type());
  Panels turned{true, 1, P.size(0), kColumns, dtype, 0};
  bool in_place = dtype == P.scalar_type() && dtype == at::kFloat && innermost(P);
  std::vector<at::BFloat16> narrow = {};

  static bool innermost(const at::Tensor& P) {
    return P.stride(0) == 1 && P.stride(2) >= P.size(0);
  }
  // P is read once a group of sequences, which should be large, and the rest follows.
  static Cut cut(int64_t) {
    return {kTile / 2, kColumns, kHeldBytes / (4 * (kTile / 2) * kColumns)};
  }

  void close(const Held<float>& held) {
    for (int64_t r = 0; r < held.m; r++) {
      for (int64_t j = 0; j < held.n; j += kColumns) {
        piece(held, r, j, std::min(kColumns, held.n - j));
      }
    }
  }

  void piece(const Held<float>& held, int64_t r, int64_t j, int64_t n) {
    const int64_t Q = P.size(0), sj = P.stride(2);
    turned.depth = n;
    turned.padded_depth = round_up(n, kLanes);
    const int64_t K = dtype == at::kBFloat16 ? round_up(n, 2) : n;
    const float* tiles = held.G + r * held.ld + j;
    const void* G = tiles;
    int64_t area = held.area;
    if (dtype == at::kBFloat16) {
      area = kColumns + kLanes;
      narrow.resize(held.sequences * area);
      for (int64_t b = 0; b < held.sequences; b++) {
        convert(&narrow[b * area], tiles + b * held.area, n);
        if (K > n) narrow[b * area + n] = 0;
      }
      G = narrow.data();
    }
    for (int64_t p = 0; p < turned.count; p++) {
      const int64_t q = turned.begin(p);
      const int64_t element = q * P.stride(0) + (held.o + r) * P.stride(1) + (held.j + j) * sj;
      const char* data = static_cast<const char*>(P.const_data_ptr()) + element * P.element_size();
      if (!in_place) {
        turned.fill(0, 0, turned.size(p), {data, P.scalar_type(), P.stride(0), sj}, false, nullptr,
                    0, turned.padded_depth);
      }
      multiply_add(dtype, held.sequences, turned.size(p), K, G, area,
                   in_place ? data : turned.at(0, 0, 0), in_place ? sj : turned.line,
                   held.sums + held.b * Q + q, Q);
    }
  }
};

// Few queries or sequences: four of one meet four of the other, sixteen dot products from eight
// streams, in pieces that stay in the first-level cache.
template <class Acc>
struct Dots {
  static constexpr int64_t kPiece = 16384;  // elements of a stream
  // A single sequence is as fast as P is read: rows of it, as they lie.
  static Cut cut(int64_t B) {
    return B < kSequences ? Cut{kTile / 4, 16 * kTile, kSequences} : Product::cut(B);
  }
  const at::Tensor& P;
  Tile<Acc> room{4 * kPiece};

  void close(const Held<Acc>& held) {
    const int64_t columns = std::min(kPiece, held.n), rows = kPiece / columns;
    for (int64_t r = 0; r < held.m; r += rows) {
      for (int64_t j = 0; j < held.n; j += columns) {
        piece(held, r, std::min(rows, held.m - r), j, std::min(columns, held.n - j));
      }
    }
  }

  void piece(const Held<Acc>& held, int64_t r, int64_t m, int64_t j, int64_t n) {
    const int64_t Q = P.size(0);
    for (int64_t q = 0; q < Q; q += 4) {
      const int64_t queries = std::min<int64_t>(4, Q - q);
      const Acc *x[4], *y[4];
      int64_t ld = 0;
      for (int64_t k = 0; k < queries; k++) {
        x[k] = query_rows(P, q + k, held.o + r, m, held.j + j, n, room.data + k * kPiece, ld);
      }
      for (int64_t b = 0; b < held.sequences; b += 4) {
        const int64_t sequences = std::min<int64_t>(4, held.sequences - b);
        for (int64_t k = 0; k < sequences; k++) {
          y[k] = held.G + (b + k) * held.area + r * held.ld + j;
        }
        dots(held.sums + (held.b + b) * Q + q, 1, Q, x, queries, ld, y, sequences, held.ld, m, n);
      }
    }
  }
};

// s [Q,B].
template <class Acc, class Closing>
void by_sequence(at::Tensor& s, const at::Tensor& P, const at::Tensor& g, const at::Tensor& a,
                 bool bias, const Letters& size) {
  const Cut cut = Closing::cut(size.B);
  const Panels A = pack_rows(g.mT(), {.width = cut.rows});
  const Panels B = pack_columns(a, size.O, {.ones = bias});
  // A tile here is several panels of columns.
  const int64_t wide = std::min(B.count, cut.columns / kTile), across = ceil_div(B.count, wide);
  // Not a power of two: rows of the same tile would meet in the same few lines of the caches.
  const int64_t ld = across == 1 ? size.J : wide * B.width, tiles = A.count * across,
                area = cut.rows * ld + kLanes;
  const int64_t group = std::min<int64_t>(size.B, cut.sequences);
  // Partial sums of a few tiles a block; blocks depend on the shape alone, so results repeat.
  const int64_t a_block = ceil_div(tiles, kBlocks), blocks = ceil_div(tiles, a_block);
  at::Tensor partial = at::zeros({blocks, size.B, size.Q}, at::dtype(s.scalar_type()));
  Acc* sums = partial.mutable_data_ptr<Acc>();
  const int64_t work = a_block * area * size.B * (size.T + size.Q);
  at::parallel_for(0, blocks, grain(work), [&](int64_t begin, int64_t end) {
    Tile<Acc> G(group * area);
    Closing closing{P};
    for (int64_t tile = begin * a_block; tile < std::min(tiles, end * a_block); tile++) {
      const int64_t i = tile / across, j0 = tile % across * wide;
      const int64_t j1 = std::min(B.count, j0 + wide), n = B.begin(j1 - 1) + B.size(j1 - 1);
      for (int64_t b = 0; b < size.B; b += group) {
        const int64_t held = std::min(group, size.B - b);
        for (int64_t k = 0; k < held; k++) {
          for (int64_t j = j0; j < j1; j++) {
            multiply<Acc>(A, b + k, i, B, b + k, j, G.data + k * area + B.begin(j - j0), ld);
          }
        }
        Held<Acc> tiles_of{G.data,
                           area,
                           ld,
                           b,
                           held,
                           A.begin(i),
                           A.size(i),
                           B.begin(j0),
                           n - B.begin(j0),
                           sums + tile / a_block * size.B * size.Q};
        // Whole rows that follow each other are one.
        if (tiles_of.n == ld && P.stride(1) == ld * P.stride(2)) {
          tiles_of.n *= std::exchange(tiles_of.m, 1);
        }
        closing.close(tiles_of);
      }
    }
    release(A);
  });
  s.add_(partial.sum(0).t());
}

// s [Q,B,T]: row n of g P_q, dotted with row n of (a, 1).
template <class Acc>
void by_token(at::Tensor& s, const at::Tensor& P, const at::Tensor& g, const at::Tensor& a,
              bool bias, const Letters& size) {
  const int64_t N = size.B * size.T;
  const at::Tensor inputs = a.reshape({N, size.I}).to(s.scalar_type()).contiguous();
  const Panels A = pack_rows(g.reshape({1, N, size.O})), B = pack_columns(P, N);
  at::Tensor total = at::zeros({size.Q, N}, at::dtype(s.scalar_type()));
  Acc* sums = total.mutable_data_ptr<Acc>();
  const Acc* data = inputs.const_data_ptr<Acc>();
  at::parallel_for(0, size.Q * A.count, 1, [&](int64_t begin, int64_t end) {
    Tile<Acc> C(A.width * B.line);
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t q = unit / A.count, i = unit % A.count;
      for (int64_t j = 0; j < B.count; j++) {
        multiply<Acc>(A, 0, i, B, q, j, C.data, B.line);
        const int64_t n = std::min(B.size(j), size.I - B.begin(j));
        for (int64_t r = 0; r < A.size(i); r++) {
          const Acc* row = C.data + r * B.line;
          Acc& sum = sums[q * N + A.begin(i) + r];
          if (n > 0) sum += dot(row, data + (A.begin(i) + r) * size.I + B.begin(j), n);
          if (bias && j == B.count - 1) sum += row[B.size(j) - 1];
        }
      }
    }
    release(A);
  });
  s.add_(total.view({size.Q, size.B, size.T}));
}

void dense_scores(at::Tensor& s, const at::Tensor& P, const at::Tensor& g, const at::Tensor& a,
                  bool bias) {
  const Letters size =
      check("dense_scores", "s[Q,B]|[Q,B,T] P[Q,O,J] g[B,T,O] a[B,T,I]", {s, P, g, a}, bias);
  if (s.numel() == 0 || P.numel() == 0) return;
  auto run = [&]<class Acc>(Acc) {
    if (s.dim() == 3) return by_token<Acc>(s, P, g, a, bias, size);
    if constexpr (std::is_same_v<Acc, float>) {
      if ((size.B >= kSequences || Product::innermost(P)) && size.Q >= kQueries) {
        return by_sequence<Acc, Product>(s, P, g, a, bias, size);
      }
    }
    by_sequence<Acc, Dots<Acc>>(s, P.stride(2) == 1 ? P : P.contiguous(), g, a, bias, size);
  };
  g.scalar_type() == at::kDouble ? run(double{}) : run(float{});
}

}  // namespace
}  // namespace ekfac_fast::cpu

TORCH_LIBRARY_IMPL(ekfac_fast, CPU, m) { m.impl("dense_scores", &ekfac_fast::cpu::dense_scores); }
