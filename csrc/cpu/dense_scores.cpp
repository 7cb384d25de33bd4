// s_qb += <P_q, G_b>: the product [Q,OJ] x [OJ,B], of which the right side is made a tile at a time
// and met by every query while it is in cache. Per token: `token_scores.cpp`.
#include <ATen/ops/bmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>

#include "../check.h"
#include "endings.h"
#include "gradients.h"
#include "isa.h"
#include "scratch.h"
#include "token_scores.h"

namespace ekfac_fast::cpu {
namespace {

// How gradients are cut: what a thread holds of them stays in the last-level cache.
struct Cut {
  int64_t rows, columns, sequences;
};
constexpr int64_t kHeldBytes = int64_t{4} << 20;
constexpr int64_t kLibraryBytes = int64_t{16} << 20;  // of whole gradients
constexpr int64_t kBlocks = 64;                       // partial sums at most
constexpr int64_t kGroup = 64;                        // sequences that meet P at a time
constexpr int64_t kSmall = 2048;                      // elements of a gradient
constexpr int64_t kSequences = 8;                     // fewer: P is read for them alone

// Whether the library makes gradients, and products with them. Not with AVX-512 those of few
// sequences or tokens: there ours are closed while they are in cache.
bool library_is_faster(const at::Tensor& g, const Letters& size) {
  const bool many = size.T >= kSequences && (size.B == 1 || size.B >= kSequences);
  return library_is_fastest(g.scalar_type()) && (many || !has_avx512());
}

// Whether the same piece of all rows lies in the same few lines of the caches.
bool collides(const at::Tensor& P) { return P.stride(0) * P.element_size() % 4096 == 0; }

// Sequences whose whole gradients the library writes at a time; 0 where ours are faster: of few
// tokens, or so large that P would be read more often.
int64_t library_sequences(const at::Tensor& g, const at::Tensor& a, const Letters& size) {
  const int64_t fit = kLibraryBytes / (g.element_size() * size.O * size.J);
  const int64_t group = std::min(size.B, kGroup);
  return library_forms(g, a, size.J) && size.T >= 32 && group <= fit ? group : 0;
}

// How the library cuts them: whole rows, enough of them that it reads `a` seldom.
Cut library_cut(const Letters& size) {
  const int64_t row = 4 * size.J, fit = kLibraryBytes / (std::min(size.O, kTile / 2) * row);
  const int64_t group = std::min(size.B, std::clamp<int64_t>(fit, kGroup / 4, 4 * kGroup));
  return {std::clamp<int64_t>(kLibraryBytes / (group * row), 1, size.O), size.J, group};
}

// Whether the product of all queries at a time is faster than dot products, four by four.
bool product_is_faster(const at::Tensor& P, const Letters& size) {
  const bool bf16 = compute_dtype(P.scalar_type()) == at::kBFloat16;
  if (size.B >= kSequences) return size.Q >= (bf16 ? 4 : 12);
  return bf16 && size.Q >= 12 && !collides(P);
}

// Whether bf16 is dotted as it lies: of few sequences P is read once, of few queries turning
// gradients would take longer than their products.
bool dots_as_it_lies(const at::Tensor& P, const at::Tensor& g, const at::Tensor& a,
                     const Letters& size) {
  if (P.scalar_type() != at::kBFloat16 || !has_bf16_products()) return false;
  // Every vector of odd rows lies across two lines of the caches.
  if (size.B < kSequences) return size.B < 4 || size.J % 2 == 0 || size.Q < kGroup;
  if (size.Q < 4) return false;
  return library_sequences(g, a, size) ? size.Q <= 8 : size.Q < 8 && size.J > kTile;
}

// Gradient tiles of a group of sequences, [m,n] of [O,J] from (o,j) on, `area` apart, and the
// scores they add to.
template <class Acc>
struct Held {
  const void* G;
  at::ScalarType dtype;
  int64_t area, ld, b, sequences, o, m, j, n;
  Acc* sums;  // [Q,B]
};

// A few rows of P_q as dot products read them: in place if they are Acc already, else widened into
// `room`.
template <class Out>
const Out* query_rows(const at::Tensor& P, int64_t q, int64_t o, int64_t m, int64_t j, int64_t n,
                      Out* room, int64_t& ld) {
  auto from = [&]<class In>(In) -> const Out* {
    const In* data = P.const_data_ptr<In>() + q * P.stride(0) + o * P.stride(1) + j;
    if constexpr (std::is_same_v<In, Out>) {
      ld = P.stride(1);
      return data;
    } else {
      ld = n;
      for (int64_t r = 0; r < m; r++) convert(room + r * n, data + r * P.stride(1), n);
      return room;
    }
  };
  if constexpr (sizeof(Out) != 4)  // fp64 and bf16 are never converted
    return from(Out{});
  else if (P.scalar_type() == at::kBFloat16)
    return from(at::BFloat16{});
  else if (P.scalar_type() == at::kHalf)
    return from(at::Half{});
  else
    return from(float{});
}

// Many queries: the product [Q,OJ] x [OJ,B], a row of the tile at a time. Gradients are turned on
// their way to the cache; rows of P are multiplied as they lie, unless they are to be converted,
// end in half a pair, or would all meet in the same few lines of the caches.
struct Product {
  using Stream = float;
  static constexpr bool kNarrows = true;     // gradients to the operands' dtype
  static constexpr int64_t kArea = 1 << 15;  // elements of turned gradients
  const at::Tensor& P;
  const Letters& size;
  at::ScalarType dtype = compute_dtype(P.scalar_type());
  // The longer pieces of P are, the faster they come from memory.
  int64_t sequences = std::min(size.B, kGroup),
          length =
              std::clamp(kArea / round_up(sequences, kLanes) / kDepth, int64_t{1}, int64_t{8}) *
              kDepth;
  Panels turned{true, 1, sequences, length, dtype, 0};
  Panels rows{false, 1, std::min(P.size(0), kTile), kDepth, dtype, 0};
  bool in_place = dtype == P.scalar_type() && (sequences > 2 * kLanes || !collides(P));

  // P is read once a group of sequences, which should be large, and the rest follows.
  static Cut cut(const Letters& size) {
    const int64_t sequences = std::min(size.B, kGroup);
    return {kTile / 2, round_up(kHeldBytes / (4 * (kTile / 2) * sequences), kTile), sequences};
  }

  void close(const Held<float>& held) {
    for (int64_t r = 0; r < held.m; r++) {
      for (int64_t j = 0; j < held.n; j += length) {
        piece(held, r, j, std::min(length, held.n - j));
      }
    }
  }

  void piece(const Held<float>& held, int64_t r, int64_t j, int64_t n) {
    const bool paired = dtype == at::kBFloat16;
    const int64_t whole = paired ? round_up(n, 2) : n;
    const Matrix G(
        static_cast<const char*>(held.G) + (r * held.ld + j) * c10::elementSize(held.dtype),
        held.dtype, held.area, 1);
    turned.depth = n;
    turned.padded_depth = round_up(n, 2);
    for (int64_t k = 0; k < n; k += kDepth) {
      turned.fill(0, 0, held.sequences, G, false, nullptr, k,
                  std::min(k + kDepth, turned.padded_depth));
    }
    for (int64_t q = 0; q < P.size(0); q += kTile) {
      const int64_t queries = std::min(kTile, P.size(0) - q), step = P.stride(0);
      float* sums = held.sums + q * size.B + held.b;
      const char* x = static_cast<const char*>(P.const_data_ptr()) +
                      (q * step + (held.o + r) * P.stride(1) + held.j + j) * P.element_size();
      if (in_place && whole == n && step >= n) {
        multiply_add(dtype, queries, held.sequences, n, x, step, turned.at(0, 0, 0), turned.line,
                     sums, size.B);
        continue;
      }
      for (int64_t k = 0, chunk = 0; k < n; k += kDepth, chunk++) {
        rows.depth = std::min(kDepth, n - k);
        rows.padded_depth = round_up(rows.depth, 2);
        rows.fill(0, 0, queries, {x + k * P.element_size(), P.scalar_type(), step, 1}, false,
                  nullptr, 0, rows.padded_depth);
        multiply_add(dtype, queries, held.sequences, std::min(kDepth, whole - k), rows.at(0, 0, 0),
                     rows.ld(0), turned.at(0, 0, chunk), turned.line, sums, size.B);
      }
    }
  }
};

// s [Q,n] += x [Q,K] y [n,K]^T. On one thread the library is up to twice as fast with the fewer
// rows first, unless they fill its tiles.
void add_product(at::Tensor s, const at::Tensor& x, const at::Tensor& y) {
  if (y.size(0) >= x.size(0) || y.size(0) % 16 == 0) {
    s.addmm_(x, y.t());
  } else {
    s.add_(at::mm(y, x.t()).t());
  }
}

// Many queries where the library is the fastest: its product of rows of P and of gradients as both
// lie.
struct Library {
  using Stream = float;
  static constexpr bool kNarrows = false;
  static Cut cut(const Letters& size) { return library_cut(size); }
  const at::Tensor& P;
  const Letters& size;

  void close(const Held<float>& held) {
    const int64_t Q = P.size(0);
    at::Tensor s = at::from_blob(held.sums + held.b, {Q, held.sequences}, {size.B, 1}, P.options());
    auto rows = [&](const float* x, int64_t n, int64_t step, int64_t r) {
      return at::from_blob(const_cast<float*>(x) + r, {n, held.n}, {step, 1}, P.options());
    };
    const float* from = P.const_data_ptr<float>() + held.o * P.stride(1) + held.j;
    for (int64_t r = 0; r < held.m; r++) {
      add_product(s, rows(from, Q, P.stride(0), r * P.stride(1)),
                  rows(static_cast<const float*>(held.G), held.sequences, held.area, r * held.ld));
    }
  }
};

// Few queries or sequences: four of one meet four of the other, sixteen dot products from eight
// streams In, in pieces that stay in the caches; bf16 as it lies.
template <class Acc, class In = Acc>
struct Dots {
  using Stream = In;
  static constexpr bool kNarrows = !std::is_same_v<In, Acc>;
  static constexpr int64_t kPiece = 16384;  // elements of a stream
  // A single sequence is as fast as P is read: long rows of it, as they lie.
  static Cut cut(const Letters& size) {
    if (size.B >= kSequences) return {kTile / 2, (kNarrows ? 1 : 2) * kTile, kGroup};
    return {std::clamp(round_up(4 * kPiece / size.J, kLanes), kTile / 4, kTile),
            round_up(ceil_div(size.J, ceil_div(size.J, 48 * kTile)), kTile), kSequences};
  }
  const at::Tensor& P;
  const Letters& size;
  Tile<In> room{kNarrows ? 0 : 4 * kPiece};
  // Few sequences and short pieces: P is read from end to end, four queries at a time.
  int64_t block = has_avx512() || size.B >= kSequences ? P.size(0) : 4;
  int64_t most = kNarrows && size.B >= kSequences ? kPiece / 4 : has_avx512() ? kPiece : kPiece / 8;

  void close(const Held<Acc>& held) {
    const int64_t columns = std::min(most, held.n), rows = most / columns, Q = P.size(0);
    for (int64_t q0 = 0; q0 < Q; q0 += block) {
      for (int64_t r = 0; r < held.m; r += rows) {
        for (int64_t j = 0; j < held.n; j += columns) {
          piece(held, q0, std::min(Q, q0 + block), r, std::min(rows, held.m - r), j,
                std::min(columns, held.n - j));
        }
      }
    }
  }

  void piece(const Held<Acc>& held, int64_t q0, int64_t q1, int64_t r, int64_t m, int64_t j,
             int64_t n) {
    for (int64_t q = q0; q < q1; q += 4) {
      const int64_t queries = std::min<int64_t>(4, q1 - q);
      const In *x[4], *y[4];
      int64_t ld = 0;
      for (int64_t k = 0; k < queries; k++) {
        x[k] = query_rows(P, q + k, held.o + r, m, held.j + j, n, room.data + k * kPiece, ld);
      }
      for (int64_t b = 0; b < held.sequences; b += 4) {
        const int64_t sequences = std::min<int64_t>(4, held.sequences - b);
        for (int64_t k = 0; k < sequences; k++) {
          y[k] = static_cast<const In*>(held.G) + (b + k) * held.area + r * held.ld + j;
        }
        dots(held.sums + q * size.B + held.b + b, size.B, 1, x, queries, ld, y, sequences, held.ld,
             m, n);
      }
    }
  }
};

// s [Q,B].
template <class Acc, class Closing>
void by_sequence(at::Tensor& s, const at::Tensor& P, const at::Tensor& g, const at::Tensor& a,
                 bool bias, const Letters& size) {
  using Stream = typename Closing::Stream;
  constexpr bool same = std::is_same_v<Stream, Acc>;
  const bool exact = Closing::kNarrows || g.scalar_type() == s.scalar_type();
  // Where the library is the fastest it makes a few rows of the gradients at a time.
  const bool rows_alone = library_is_faster(g, size);
  const int64_t library = exact && !rows_alone ? library_sequences(g, a, size) : 0;
  const Cut cut = rows_alone ? library_cut(size)
                  : library  ? Cut{Closing::cut(size).rows, size.J, library}
                             : Closing::cut(size);
  const at::Tensor inputs = rows_alone && bias ? with_ones(a) : a;
  std::optional<Panels> A, B;
  if (!library && !rows_alone) {
    A = pack_rows(g.mT(), {.width = cut.rows});
    B = pack_columns(a, size.O, {.ones = bias});
  }
  // A tile here is several panels of columns.
  const int64_t width = B ? B->width : size.J;
  const int64_t columns = std::min(size.J, std::max<int64_t>(1, cut.columns / kTile) * width);
  const int64_t across = ceil_div(size.J, columns), tiles = ceil_div(size.O, cut.rows) * across;
  // Not a power of two: rows of the same tile would meet in the same few lines of the caches.
  const int64_t area = library      ? size.O * size.J
                       : rows_alone ? cut.rows * columns
                                    : cut.rows * columns + kLanes;
  const int64_t group = std::min(size.B, cut.sequences);
  // Partial sums of a few tiles a block; blocks depend on the shape alone, so results repeat.
  const int64_t most = std::clamp<int64_t>(kHeldBytes / (4 * size.Q * size.B), 8, kBlocks);
  const int64_t a_block = ceil_div(tiles, most), blocks = ceil_div(tiles, a_block);
  at::Tensor partial = at::zeros({blocks, size.Q, size.B}, at::dtype(s.scalar_type()));
  Acc* sums = partial.mutable_data_ptr<Acc>();
  const int64_t work = a_block * cut.rows * columns * size.B * (size.T + size.Q);
  for (int64_t b0 = 0; b0 < size.B; b0 += library ? group : size.B) {
    const int64_t b1 = library ? std::min(b0 + group, size.B) : size.B;
    at::Tensor G;
    if (library) G = unrotated_gradients(g.narrow(0, b0, b1 - b0), a.narrow(0, b0, b1 - b0), bias);
    at::parallel_for(0, blocks, grain(work), [&](int64_t begin, int64_t end) {
      const at::Tensor block =
          scratch({library ? 0 : group * area}, c10::CppTypeToScalarType<Stream>::value);
      Stream* room = block.mutable_data_ptr<Stream>();
      Tile<Acc> wide(!B || same ? 0 : cut.rows * width);
      Closing closing{P, size};
      for (int64_t tile = begin * a_block; tile < std::min(tiles, end * a_block); tile++) {
        const int64_t o = tile / across * cut.rows, j = tile % across * columns;
        for (int64_t b = b0; b < b1; b += group) {
          Held<Acc> held{room,
                         c10::CppTypeToScalarType<Stream>::value,
                         area,
                         columns,
                         b,
                         std::min(group, b1 - b),
                         o,
                         std::min(cut.rows, size.O - o),
                         j,
                         std::min(columns, size.J - j),
                         sums + tile / a_block * size.B * size.Q};
          if (library) {
            held.G = static_cast<const char*>(G.const_data_ptr()) + o * size.J * G.element_size();
            held.dtype = G.scalar_type();
          }
          if (rows_alone) {
            held.area = held.m * size.J;
            at::Tensor G = at::from_blob(room, {held.sequences, held.m, size.J}, P.options());
            at::bmm_out(G, g.narrow(0, b, held.sequences).narrow(2, o, held.m).mT(),
                        inputs.narrow(0, b, held.sequences));
          }
          for (int64_t k = 0; B && k < held.sequences; k++) {
            for (int64_t p = j / width; p * width < j + held.n; p++) {
              Stream* to = room + k * area + p * width - j;
              if constexpr (same) {
                multiply<Acc>(*A, b + k, o / cut.rows, *B, b + k, p, to, columns);
              } else {
                multiply<Acc>(*A, b + k, o / cut.rows, *B, b + k, p, wide.data, width);
                for (int64_t r = 0; r < held.m; r++) {
                  convert(to + r * columns, wide.data + r * width, B->size(p));
                }
              }
            }
          }
          join_rows(held.m, held.n, held.ld, P.stride(1));
          closing.close(held);
        }
      }
      if (A) release(*A);
    });
  }
  s.add_(blocks > 1 ? partial.sum(0) : partial[0]);
}

void dense_scores(at::Tensor& s, const at::Tensor& P, const at::Tensor& g, const at::Tensor& a,
                  bool bias) {
  const Letters size =
      check("dense_scores", "s[Q,B]|[Q,B,T] P[Q,O,J] g[B,T,O] a[B,T,I]", {s, P, g, a}, bias);
  if (s.numel() == 0 || P.numel() == 0) return;
  if (s.dim() == 3) return token_scores(s, P, g, a, bias, size);
  // Gradients that stay in the caches are one product of the library, where that is the fastest.
  if (library_is_faster(g, size) && P.stride(2) == 1 && P.stride(1) == size.J &&
      4 * size.B * size.O * size.J <= kLibraryBytes) {
    s.addmm_(P.flatten(1), unrotated_gradients(g, a, bias).flatten(1).t());
    return;
  }
  // A gradient of one token is an outer product: not made.
  if (size.T == 1 && size.B >= kLanes && size.O * size.J >= kSmall) {
    return token_scores(s.unsqueeze(2), P, g, a, bias, size);
  }
  auto run = [&]<class Acc>(Acc) {
    const at::Tensor rows = P.stride(2) == 1 ? P : P.contiguous();
    if constexpr (std::is_same_v<Acc, float>) {
      if (dots_as_it_lies(rows, g, a, size)) {
        return by_sequence<Acc, Dots<Acc, at::BFloat16>>(s, rows, g, a, bias, size);
      }
      if (library_is_faster(g, size)) {
        return by_sequence<Acc, Library>(s, rows, g, a, bias, size);
      }
      if (product_is_faster(rows, size)) {
        return by_sequence<Acc, Product>(s, rows, g, a, bias, size);
      }
    }
    by_sequence<Acc, Dots<Acc>>(s, rows, g, a, bias, size);
  };
  g.scalar_type() == at::kDouble ? run(double{}) : run(float{});
}

}  // namespace
}  // namespace ekfac_fast::cpu

TORCH_LIBRARY_IMPL(ekfac_fast, CPU, m) { m.impl("dense_scores", &ekfac_fast::cpu::dense_scores); }
