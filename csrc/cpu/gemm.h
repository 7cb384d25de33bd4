// Matrix products in cache-sized tiles, each handed to an ending while it is hot.
//
//   C[m,n] = sum_k A[m,k] B[k,n],   in tiles of at most 128 x 128
//
// Sums are fp32 whatever the operands are (fp64 for fp64).
//
// Operands are packed once into panels: contiguous, zero padded, converted to what this CPU
// multiplies (bf16 stays bf16 where there are bf16 products, else 16-bit is widened here). Packing
// is what makes any stride, any dtype, the implied ones column and the skipping of masked rows cost
// one pass and nothing in the product. Only rows that lie as the product wants them are not packed:
// that pass was a third of `low_rank_scores` for a few queries. The product itself is oneDNN's
// batch-reduce GEMM through ATen, at 98 % of the arithmetic peak where it was measured (Zen 5);
// MKL, which `torch.mm` calls, reached 43 % there.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <memory>
#include <new>

namespace ekfac_fast {

constexpr int64_t kTile = 128;   // rows and columns of a tile: 64 KiB of fp32
constexpr int64_t kDepth = 256;  // k per chunk: two 128 KiB panels and the tile fit in 512 KiB
constexpr int64_t kLanes = 16;   // panels are padded to whole vectors
constexpr int64_t kBlock = 32;   // k packed at a time
// Operands are packed in slabs of this size: larger ones leave the last-level cache and gain
// nothing.
constexpr int64_t kSlabBytes = int64_t{31} << 20;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
// How many lines of `depth` fp32 elements fit in a slab, in whole tiles.
inline int64_t slab_lines(int64_t depth) {
  return round_up(std::max<int64_t>(1, kSlabBytes / (4 * std::max<int64_t>(1, depth))), kTile);
}

// The dtype in which operands of `dtype` are multiplied: fp64, fp32 or bf16. fp32 goes through bf16
// where the user allowed it, torch.set_float32_matmul_precision("medium"), and the CPU has such
// products.
at::ScalarType compute_dtype(at::ScalarType dtype);

// A matrix in place: element (f, k) of the free and the summed dimension is data[f * sf + k * sk].
struct Matrix {
  const char* data;
  at::ScalarType dtype;
  int64_t sf, sk;

  Matrix(const at::Tensor& x, int64_t free_dim, int64_t k_dim, int64_t b, int64_t from);
};

// One side of a product, cut into panels along its free dimension (m or n).
struct Panels {
  at::Tensor storage;
  bool columns;           // the right operand: k-major panels (pairs of k interleaved for bf16)
  int64_t batch;          // 1: the same matrix for every batch entry
  int64_t extent, depth;  // free and summed sizes
  int64_t padded_depth;   // depth in whole vectors
  int64_t width, count;   // width (padded) and number of panels
  // Rows that are in place: elements from one to the next and from matrix to matrix; 0 if packed.
  int64_t row_stride = 0, batch_stride = 0;

  // `extent` in panels of equal width, at most kTile unless `width` says so. Not filled.
  Panels(bool columns, int64_t batch, int64_t extent, int64_t depth, at::ScalarType compute,
         int64_t width = 0);

  // rows [batch, m, k] in place, k contiguous.
  explicit Panels(const at::Tensor& rows);

  int64_t begin(int64_t panel) const { return panel * width; }
  int64_t size(int64_t panel) const { return std::min(width, extent - panel * width); }
  // Lines of a panel that are multiplied: past `size` there is nothing in place.
  int64_t lines(int64_t panel) const { return row_stride ? size(panel) : width; }
  char* at(int64_t b, int64_t panel, int64_t chunk) const;

  // Writes lines [to, to + n) of one panel from x, after them a line of ones if `ones`, and zeroes
  // what lies beyond if this is the `last` fill of the panel; for k in [k0, k1), inside one chunk
  // and from a multiple of kBlock. `pick`: which k take part, in order.
  void fill(int64_t b, int64_t panel, int64_t to, int64_t n, const Matrix& x, bool ones, bool last,
            const int64_t* pick, int64_t k0, int64_t k1);
};

// x [batch, m, k] as the left operand; `ones` appends a row of ones. Left in place where its rows
// can be multiplied as they are.
Panels pack_rows(const at::Tensor& x, bool ones = false, const at::Tensor& pick = {});
// x [batch, k, n] as the right operand; `ones` appends a column of ones.
Panels pack_columns(const at::Tensor& x, bool ones = false, const at::Tensor& pick = {});

// C[A.width, B.width] = A panel i of matrix a, times B panel j of matrix b.
template <class Acc>
void multiply(const Panels& A, int64_t a, int64_t i, const Panels& B, int64_t b, int64_t j, Acc* C);
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

// Every tile of every A_b B_b: ending(b, m0, m, n0, n, C, ldc, tile index). All b of one tile run
// on one thread, in order, so an ending may accumulate over b without races and the result is
// repeatable. `upper`: of a square, tiles strictly below the diagonal are left out.
template <class Acc, class Ending>
void product(const Panels& A, const Panels& B, const Ending& ending, bool upper = false) {
  const int64_t batch = std::max(A.batch, B.batch);
  // Threads take equal shares of what is multiplied: of a triangle, too.
  const int64_t tiles = upper ? A.count * (A.count + 1) / 2 : A.count * B.count;
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    Tile<Acc> C(A.width * B.width);
    for (int64_t tile = begin; tile < end; tile++) {
      int64_t i = tile / B.count, j = tile % B.count;
      if (upper) {
        for (i = 0, j = tile; j >= B.count; i++) j -= B.count - i - 1;
      }
      for (int64_t b = 0; b < batch; b++) {
        multiply<Acc>(A, b, i, B, b, j, C.data);
        ending(b, A.begin(i), A.size(i), B.begin(j), B.size(j), C.data, B.width, tile);
      }
    }
    release(A);
  });
}

}  // namespace ekfac_fast
