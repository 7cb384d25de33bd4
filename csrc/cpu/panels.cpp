#include "endings.h"
#include "gemm.h"
#include "scratch.h"

namespace ekfac_fast::cpu {

Matrix::Matrix(const at::Tensor& x, int64_t free_dim, int64_t k_dim, int64_t b, int64_t from)
    : dtype(x.scalar_type()), sf(x.stride(free_dim)), sk(x.stride(k_dim)) {
  data = static_cast<const char*>(x.const_data_ptr()) +
         (b * x.stride(0) + from * sf) * x.element_size();
}

Panels::Panels(bool columns, int64_t batch, int64_t extent, int64_t depth, at::ScalarType compute,
               int64_t width)
    : columns(columns),
      batch(batch),
      extent(extent),
      depth(depth),
      padded_depth(round_up(depth, 2)),
      width(width ? width : panel_width(extent)),
      count(ceil_div(extent, this->width)),
      line(round_up(this->width, kLanes)) {
  storage = scratch({batch * count * line * padded_depth}, compute);
}

Panels::Panels(const at::Tensor& x, bool columns, int64_t width)
    : storage(x),
      columns(columns),
      batch(x.size(0)),
      extent(x.size(columns ? 2 : 1)),
      depth(x.size(columns ? 1 : 2)),
      padded_depth(depth),
      width(width ? width : panel_width(extent)),
      count(ceil_div(extent, this->width)),
      line(round_up(this->width, kLanes)),
      stride(std::max(x.stride(1), x.size(2))),
      batch_stride(x.size(0) > 1 ? x.stride(0) : 0) {}

char* Panels::at(int64_t b, int64_t panel, int64_t chunk) const {
  const int64_t element =
      stride ? b * batch_stride + (columns ? begin(panel) + chunk * kDepth * stride
                                           : begin(panel) * stride + chunk * kDepth)
             : line * (((batch > 1 ? b * count : 0) + panel) * padded_depth + chunk * kDepth);
  return static_cast<char*>(const_cast<void*>(storage.const_data_ptr())) +
         element * storage.element_size();
}

namespace {

template <class T>
constexpr int64_t kPair = sizeof(T) == 2 ? 2 : 1;

// n elements as Out: x itself, or converted into `room`.
template <class Out, class In>
const Out* as(const In* x, Out* room, int64_t n) {
  if constexpr (std::is_same_v<In, Out>) {
    return x;
  } else {
    convert(room, x, n);
    return room;
  }
}

// Lines of a panel from rows of k: y[f,k], k contiguous, from row(k)[f]; or, for bf16 columns, the
// other way round: words of 32 bits hold a pair of k there. Sixteen k at a time.
template <class Out, class In, class Row>
void transpose_rows(Out* y, int64_t ld, int64_t n, int64_t depth, const Row& row) {
  alignas(64) Out words[kLanes * kTile], even[kTile], odd[kTile], zeros[kTile] = {};
  for (int64_t k = 0; k < depth; k += kLanes) {
    const int64_t rows = std::min(kLanes, depth - k);
    if constexpr (sizeof(Out) == 4) {
      for (int64_t r = 0; r < rows; r++) convert(words + r * n, row(k + r), n);
      transpose(y + k, ld, words, n, rows, n);
    } else {
      for (int64_t r = 0; r < rows; r += 2) {
        interleave(words + r * n, 0, as(row(k + r), even, n),
                   r + 1 < rows ? as(row(k + r + 1), odd, n) : zeros, 0, n, 1);
      }
      transpose(y + k, ld / 2, words, n, ceil_div(rows, 2), n);
    }
  }
}

// One chunk of a row panel: y[f,k], k contiguous.
template <class Out, class In>
void fill_rows(Out* y, int64_t ld, int64_t n, int64_t depth, const In* x, int64_t sf, int64_t sk,
               const int64_t* pick) {
  auto row = [&](int64_t k) { return x + (pick ? pick[k] : k) * sk; };
  if (sk == 1 && !pick) {
    for (int64_t f = 0; f < n; f++) convert(y + f * ld, x + f * sf, depth);
    return;
  }
  if constexpr (sizeof(Out) < 8) {
    if (std::is_same_v<In, float> && sizeof(Out) == 4 && sf == 1 && !pick) {
      return transpose(y, ld, x, sk, depth, n);
    }
    if (sf == 1) return transpose_rows<Out, In>(y, ld, n, depth, row);
  }
  for (int64_t k0 = 0; k0 < depth; k0 += kLanes) {  // blocks, so that both sides stay in cache
    const int64_t k1 = std::min(k0 + kLanes, depth);
    for (int64_t f = 0; f < n; f++) {
      for (int64_t k = k0; k < k1; k++) y[f * ld + k] = static_cast<Out>(row(k)[f * sf]);
    }
  }
}

// One chunk of a column panel: y[k,f], f contiguous; for bf16 y[k/2,f,k%2].
template <class Out, class In>
void fill_columns(Out* y, int64_t ld, int64_t n, int64_t depth, const In* x, int64_t sf, int64_t sk,
                  const int64_t* pick) {
  constexpr int64_t pair = kPair<Out>;
  auto row = [&](int64_t k) { return x + (pick ? pick[k] : k) * sk; };
  if (sf == 1 && pair == 1) {
    for (int64_t k = 0; k < depth; k++) convert(y + k * ld, row(k), n);
    return;
  }
  int64_t done = 0;
  if constexpr (sizeof(Out) < 8) {
    if (sk == 1 && !pick) {
      alignas(64) Out words[kLanes * kTile];
      for (int64_t f = 0; f < n; f += kLanes) {
        const int64_t lines = std::min(kLanes, n - f);
        if (std::is_same_v<In, Out> && sf % pair == 0) {  // words already
          transpose(y + f * pair, ld, x + f * sf, sf / pair, lines, depth / pair);
          continue;
        }
        for (int64_t k = 0; k < depth; k += kTile) {
          const int64_t some = std::min(kTile, depth - k);
          for (int64_t l = 0; l < lines; l++) {
            convert(words + l * kTile, x + (f + l) * sf + k, some);
          }
          transpose(y + k * ld + f * pair, ld, words, kTile / pair, lines, some / pair);
        }
      }
      done = depth / pair * pair;
    }
  }
  if constexpr (pair == 2) {
    if constexpr (std::is_same_v<In, Out>) {
      if (sf == 1 && !pick && done == 0) {
        interleave(y, 2 * ld, x, x + sk, 2 * sk, n, depth / 2);
        done = depth / 2 * 2;
      }
    }
    alignas(64) Out even[kTile], odd[kTile];
    for (; sf == 1 && done + 1 < depth; done += 2) {
      interleave(y + done * ld, 0, as(row(done), even, n), as(row(done + 1), odd, n), 0, n, 1);
    }
  }
  for (int64_t k = done; k < depth; k++) {
    Out* to = y + k / pair * pair * ld + k % pair;
    for (int64_t f = 0; f < n; f++) to[f * pair] = static_cast<Out>(row(k)[f * sf]);
  }
}

template <class Out, class In>
void fill_block(const Panels& panels, int64_t b, int64_t panel, int64_t n, const Matrix& x,
                bool ones, const int64_t* pick, int64_t k0, int64_t k1) {
  constexpr int64_t pair = kPair<Out>;
  const int64_t chunk = k0 / kDepth, offset = k0 % kDepth, block = k1 - k0, ld = panels.ld(chunk);
  Out* y = reinterpret_cast<Out*>(panels.at(b, panel, chunk)) +
           (panels.columns ? offset * panels.line : offset);
  const int64_t real = std::clamp<int64_t>(panels.depth - k0, 0, block);
  const In* in = reinterpret_cast<const In*>(x.data) + (pick ? 0 : k0 * x.sk);
  const int64_t* picked = pick ? pick + k0 : nullptr;
  auto cell = [&](int64_t f, int64_t k) -> Out& {
    return panels.columns ? y[k / pair * pair * ld + f * pair + k % pair] : y[f * ld + k];
  };
  for (int64_t k = real / pair * pair; k < block; k++) {
    for (int64_t f = 0; f < n + ones; f++) cell(f, k) = Out(0);
  }
  if (panels.columns) {
    fill_columns(y, ld, n, real, in, x.sf, x.sk, picked);
  } else {
    fill_rows(y, ld, n, real, in, x.sf, x.sk, picked);
  }
  for (int64_t k = 0; ones && k < real; k++) cell(n, k) = Out(1);
}

Panels pack(const at::Tensor& x, bool columns, const Packing& how) {
  const auto& [ones, pick, width] = how;
  const int64_t free_dim = columns ? 2 : 1, k_dim = columns ? 1 : 2;
  const int64_t extent = x.size(free_dim), depth = pick.defined() ? pick.numel() : x.size(k_dim);
  const int64_t* picked = pick.defined() ? pick.const_data_ptr<int64_t>() : nullptr;
  Panels panels(columns, x.size(0), extent + ones, depth, compute_dtype(x.scalar_type()), width);
  // A few k at a time across all panels: both sides are then read and written as streams.
  const int64_t blocks = ceil_div(panels.padded_depth, kBlock);
  at::parallel_for(0, panels.batch * blocks, grain(8 * kBlock * extent),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t u = begin; u < end; u++) {
                       const int64_t b = u / blocks, k = u % blocks * kBlock;
                       for (int64_t p = 0; p < panels.count; p++) {
                         const int64_t from = panels.begin(p);
                         const int64_t n = std::clamp<int64_t>(extent - from, 0, panels.width);
                         panels.fill(b, p, n, Matrix(x, free_dim, k_dim, b, from),
                                     how.ones && from + panels.width > extent, picked, k,
                                     std::min(k + kBlock, panels.padded_depth));
                       }
                     }
                   });
  return panels;
}

// Whether lines that are contiguous in the last dimension are multiplied as they are.
bool in_place(const at::Tensor& x, at::ScalarType dtype) {
  return x.scalar_type() == dtype && (x.stride(2) == 1 || x.size(2) == 1) &&
         (x.size(1) == 1 || x.stride(1) >= x.size(2));
}

}  // namespace

void Panels::fill(int64_t b, int64_t panel, int64_t n, const Matrix& x, bool ones,
                  const int64_t* pick, int64_t k0, int64_t k1) {
  auto from = [&]<class In>(In) {
    if constexpr (std::is_same_v<In, double>) {
      fill_block<double, In>(*this, b, panel, n, x, ones, pick, k0, k1);
    } else if (storage.scalar_type() == at::kFloat) {
      fill_block<float, In>(*this, b, panel, n, x, ones, pick, k0, k1);
    } else if constexpr (!std::is_same_v<In, at::Half>) {
      fill_block<at::BFloat16, In>(*this, b, panel, n, x, ones, pick, k0, k1);
    }
  };
  switch (x.dtype) {
    case at::kFloat: return from(float{});
    case at::kDouble: return from(double{});
    case at::kBFloat16: return from(at::BFloat16{});
    default: return from(at::Half{});
  }
}

Panels pack_rows(const at::Tensor& x, const Packing& how) {
  const auto dtype = compute_dtype(x.scalar_type());
  // bf16 is multiplied in pairs of k: the second of an odd last pair would be another row's.
  const bool whole = dtype == at::kFloat || (dtype == at::kBFloat16 && x.size(2) % 2 == 0);
  const bool as_it_is = whole && in_place(x, dtype) && !how.ones && !how.pick.defined();
  return as_it_is ? Panels(x, false, how.width) : pack(x, false, how);
}

Panels pack_columns(const at::Tensor& x, int64_t rows, const Packing& how) {
  const bool fp32 = compute_dtype(x.scalar_type()) == at::kFloat;
  const bool as_it_is =
      fp32 && rows <= kFew && in_place(x, at::kFloat) && !how.ones && !how.pick.defined();
  return as_it_is ? Panels(x, true, how.width) : pack(x, true, how);
}

}  // namespace ekfac_fast::cpu
