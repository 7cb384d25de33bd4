// Matrix products in cache-sized tiles, each handed to an ending while it is hot.
//
//   C[m,n] = sum_k A[m,k] B[k,n],   in tiles of at most 128 x 128
//
// Sums are fp32 whatever the operands are (fp64 for fp64).
//
// The product itself is oneDNN's batch-reduce GEMM through ATen: 98 % of the arithmetic peak where
// it was measured (Zen 4, Zen 5); MKL, which `torch.mm` calls, reached 80 % and 43 % there. On Zen
// 3 MKL is the faster: `library_is_fastest`.
//
// Operands are cut into panels: contiguous, zero padded along k, converted to what this CPU
// multiplies (bf16 stays bf16 where there are bf16 products, else 16-bit is widened). Packing is
// what makes any stride, any dtype, the implied ones column and the skipping of masked rows cost
// one pass and nothing in the product. What already lies as the product wants it stays in place:
// rows always, columns if few rows meet them, since a strided operand costs 15 % of the rate but
// packing a matrix that 16 rows meet costs more than the product.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <memory>
#include <new>

namespace ekfac_fast::cpu {

constexpr int64_t kTile = 128;   // rows and columns of a tile: 64 KiB of fp32
constexpr int64_t kDepth = 256;  // k per chunk: two 128 KiB panels and the tile fit in 512 KiB
constexpr int64_t kLanes = 16;   // lines of panels are padded to whole vectors
constexpr int64_t kBlock = 32;   // k packed at a time
constexpr int64_t kNarrow = 48;  // columns that leave much of a tile's registers idle
constexpr int64_t kFew = 256;    // rows that meet columns in place
// Operands are packed in slabs of this size: larger ones leave the last-level cache and gain
// nothing.
constexpr int64_t kSlabBytes = int64_t{31} << 20;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
// How many lines of `depth` fp32 elements fit in a slab, in whole tiles.
inline int64_t slab_lines(int64_t depth) {
  return round_up(std::max<int64_t>(1, kSlabBytes / (4 * std::max<int64_t>(1, depth))), kTile);
}
// Panels of equal width waste less than full ones and a remainder.
inline int64_t panel_width(int64_t extent) {
  return std::max(
      kLanes, round_up(ceil_div(extent, std::max<int64_t>(1, ceil_div(extent, kTile))), kLanes));
}
// How many units of so much work, in multiply-adds or bytes, are worth waking a thread for.
inline int64_t grain(int64_t work) {
  return ceil_div(int64_t{1} << 20, std::max<int64_t>(1, work));
}

// The dtype in which operands of `dtype` are multiplied: fp64, fp32 or bf16. fp32 goes through bf16
// where the user allowed it, torch.set_float32_matmul_precision("medium"), and the CPU has such
// products.
at::ScalarType compute_dtype(at::ScalarType dtype);

// Whether bf16 is better multiplied by at::mm: pairing the k of a matrix that few rows meet costs
// more than the product, as does copying long rows that end in half a pair, or rows for few
// columns. The library needs none of it, but writes the product: of a depth below its rows that
// costs more.
bool library_multiplies(int64_t rows, int64_t depth, int64_t columns, at::ScalarType dtype);

// Whether operands of `dtype` are best left to the library as they lie: fp32 where the widest
// vectors are AVX2, and on Intel's processors. Of a Zen 3's 78 GFLOP/s a core MKL reached 75 and
// packs what it needs itself; our tiles reached 68, and packing took up to half of a call.
bool library_is_fastest(at::ScalarType dtype);

// A matrix in place: element (f, k) of the free and the summed dimension is data[f * sf + k * sk].
struct Matrix {
  const char* data;
  at::ScalarType dtype;
  int64_t sf, sk;

  Matrix(const void* data, at::ScalarType dtype, int64_t sf, int64_t sk)
      : data(static_cast<const char*>(data)), dtype(dtype), sf(sf), sk(sk) {}
  Matrix(const at::Tensor& x, int64_t free_dim, int64_t k_dim, int64_t b, int64_t from);
  // The part from (f, k) on.
  Matrix from(int64_t f, int64_t k) const {
    return {data + (f * sf + k * sk) * c10::elementSize(dtype), dtype, sf, sk};
  }
};

// One side of a product, cut into panels along its free dimension (m or n).
struct Panels {
  at::Tensor storage;
  bool columns;           // the right operand: k-major panels (pairs of k interleaved for bf16)
  int64_t batch;          // 1: the same matrix for every batch entry
  int64_t extent, depth;  // free and summed sizes
  int64_t padded_depth;   // depth in whole pairs, if packed
  int64_t width, count;   // lines of a panel but the last, and number of panels
  int64_t line;           // width in whole vectors
  // In place: elements from one row (of columns: one k) to the next, and from matrix to matrix; 0
  // if packed.
  int64_t stride = 0, batch_stride = 0;

  // To be filled: `extent` in panels of equal width, at most kTile; or of the given one.
  Panels(bool columns, int64_t batch, int64_t extent, int64_t depth, at::ScalarType compute,
         int64_t width);

  // In place: rows [batch, m, k], or columns [batch, k, n], contiguous in the last dimension.
  Panels(const at::Tensor& x, bool columns, int64_t width);

  int64_t begin(int64_t panel) const { return panel * width; }
  int64_t size(int64_t panel) const { return std::min(width, extent - panel * width); }
  char* at(int64_t b, int64_t panel, int64_t chunk) const;
  // Elements from line to line of a chunk.
  int64_t ld(int64_t chunk) const {
    if (stride) return stride;
    return columns ? line : std::min(kDepth, padded_depth - chunk * kDepth);
  }

  // Writes the first n lines of a panel from x, after them a line of ones if `ones`; for k in
  // [k0, k1), inside one chunk and from a multiple of kBlock. `pick`: which k take part, in order.
  void fill(int64_t b, int64_t panel, int64_t n, const Matrix& x, bool ones, const int64_t* pick,
            int64_t k0, int64_t k1);
};

// How operands are packed.
struct Packing {
  bool ones = false;     // append a line of ones
  at::Tensor pick = {};  // which k take part, in order; undefined: all
  int64_t width = 0;     // of a panel; 0: equal ones, at most kTile wide
};
// x [batch, m, k] as the left operand. Left in place where its rows can be multiplied as they are.
Panels pack_rows(const at::Tensor& x, const Packing& how = {});
// x [batch, k, n] as the right operand of `rows` rows. Left in place if those are few and its
// columns can be multiplied as they are.
Panels pack_columns(const at::Tensor& x, int64_t rows, const Packing& how = {});

// C [m,n], rows ldc apart, = A panel i of matrix a, times B panel j of matrix b.
template <class Acc>
void multiply(const Panels& A, int64_t a, int64_t i, const Panels& B, int64_t b, int64_t j, Acc* C,
              int64_t ldc);
// C [M,N] += x [M,K] y [K,N], rows lda, ldb and ldc apart, operands fp32 or bf16; y of bf16 holds
// pairs of k, as column panels do.
void multiply_add(at::ScalarType dtype, int64_t M, int64_t N, int64_t K, const void* x, int64_t lda,
                  const void* y, int64_t ldb, float* C, int64_t ldc, bool add = true);
// Gives back per-thread matrix units (AMX); call once a thread has multiplied its last tile.
void release(const Panels& A);

// Memory for one tile a thread, aligned to cache lines.
template <class Acc>
struct Tile {
  explicit Tile(int64_t n) : data(static_cast<Acc*>(::operator new(n * sizeof(Acc), kAlign))) {}
  ~Tile() { ::operator delete(data, kAlign); }
  Tile(const Tile&) = delete;
  Tile& operator=(const Tile&) = delete;
  static constexpr std::align_val_t kAlign{64};
  Acc* data;
};

// Every tile of every A_b B_b: ending(b, m0, m, n0, n, C, ldc, index). The batch is cut into
// `parts`: all b of one tile and part run on one thread, in order, so an ending may accumulate over
// them without races and the result is repeatable; index = part x tiles + tile. `upper`: of a
// square, tiles strictly below the diagonal are left out.
template <class Acc, class Ending>
void product(const Panels& A, const Panels& B, const Ending& ending, int64_t parts = 1,
             bool upper = false) {
  const int64_t batch = std::max(A.batch, B.batch);
  parts = std::min(parts, batch);
  const int64_t part = ceil_div(batch, parts);
  // Threads take equal shares of what is multiplied: of a triangle, too.
  const int64_t tiles = upper ? A.count * (A.count + 1) / 2 : A.count * B.count;
  const int64_t work = A.width * B.width * std::max(kLanes, A.depth) * part;
  at::parallel_for(0, parts * tiles, grain(work), [&](int64_t begin, int64_t end) {
    Tile<Acc> C(A.width * B.line);
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t tile = unit % tiles, first = unit / tiles * part;
      int64_t i = tile / B.count, j = tile % B.count;
      if (upper) {
        for (i = 0, j = tile; j >= B.count; i++) j -= B.count - i - 1;
      }
      for (int64_t b = first; b < std::min(batch, first + part); b++) {
        multiply<Acc>(A, b, i, B, b, j, C.data, B.line);
        ending(b, A.begin(i), A.size(i), B.begin(j), B.size(j), C.data, B.line, unit);
      }
    }
    release(A);
  });
}

// Every tile of A x, A a single matrix of few rows, x [K,N] of 16 bits: as few rows meet each
// packed element, columns are packed a chunk at a time where they are met, not whole and
// beforehand.
struct Passing {
  const Panels& A;
  const Matrix& x;
  int64_t depth, N;
  int64_t width = panel_width(N);  // of a column panel
  int64_t span = width * std::clamp<int64_t>(2 * kFew / std::max<int64_t>(1, A.extent), 1, 4);
  int64_t count = ceil_div(N, span);

  // ending(i, m, j, n0, n, C, ldc) for every row panel i, of m rows, and every column panel j of
  // the spans [begin, end), in this order.
  template <class Ending>
  void operator()(int64_t begin, int64_t end, const Ending& ending) const {
    const auto dtype = A.storage.scalar_type();
    Panels B(true, 1, span, kDepth, dtype, width);
    const int64_t ld = B.count * B.line;
    Tile<float> C(A.extent * ld);
    for (int64_t n0 = begin * span; n0 < std::min(N, end * span); n0 += span) {
      B.extent = std::min(span, N - n0);
      B.count = ceil_div(B.extent, width);
      for (int64_t k = 0, chunk = 0; k < depth; k += kDepth, chunk++) {
        B.depth = std::min(kDepth, depth - k);
        B.padded_depth = round_up(B.depth, 2);
        const int64_t K = std::min(B.padded_depth, A.padded_depth - k);
        for (int64_t j = 0; j < B.count; j++) {
          B.fill(0, j, B.size(j), x.from(n0 + B.begin(j), k), false, nullptr, 0, B.padded_depth);
          for (int64_t i = 0; i < A.count; i++) {
            multiply_add(dtype, A.size(i), B.size(j), K, A.at(0, i, chunk), A.ld(chunk),
                         B.at(0, j, 0), B.line, C.data + A.begin(i) * ld + B.begin(j), ld, k > 0);
          }
        }
      }
      for (int64_t i = 0; i < A.count; i++) {
        for (int64_t j = 0; j < B.count; j++) {
          ending(i, A.size(i), n0 / width + j, n0 + B.begin(j), B.size(j),
                 C.data + A.begin(i) * ld + B.begin(j), ld);
        }
      }
    }
    release(A);
  }
};

}  // namespace ekfac_fast::cpu
