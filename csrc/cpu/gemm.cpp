#include "gemm.h"

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>

#include "endings.h"
#include "isa.h"
#include "scratch.h"

namespace ekfac_fast {

at::ScalarType compute_dtype(at::ScalarType dtype) {
  if (dtype == at::kDouble) return at::kDouble;
  const bool lowered = dtype == at::kFloat && at::globalContext().float32MatmulPrecision() ==
                                                  at::Float32MatmulPrecision::MEDIUM;
  return has_bf16_products() && (dtype == at::kBFloat16 || lowered) ? at::kBFloat16 : at::kFloat;
}

Matrix::Matrix(const at::Tensor& x, int64_t free_dim, int64_t k_dim, int64_t b, int64_t from)
    : dtype(x.scalar_type()), sf(x.stride(free_dim)), sk(x.stride(k_dim)) {
  data = static_cast<const char*>(x.const_data_ptr()) +
         (b * x.stride(0) + from * sf) * x.element_size();
}

namespace {

// Panels of equal width waste less than full ones and a remainder.
int64_t panel_width(int64_t extent) {
  return round_up(ceil_div(extent, std::max<int64_t>(1, ceil_div(extent, kTile))), kLanes);
}

}  // namespace

Panels::Panels(bool columns, int64_t batch, int64_t extent, int64_t depth, at::ScalarType compute,
               int64_t width)
    : columns(columns),
      batch(batch),
      extent(extent),
      depth(depth),
      padded_depth(round_up(depth, kLanes)) {
  this->width = width ? width : panel_width(extent);
  count = extent ? ceil_div(extent, this->width) : 0;
  storage = scratch({batch * count * this->width * padded_depth}, compute);
}

Panels::Panels(const at::Tensor& rows)
    : storage(rows),
      columns(false),
      batch(rows.size(0)),
      extent(rows.size(1)),
      depth(rows.size(2)),
      padded_depth(depth),
      width(panel_width(extent)),
      count(extent ? ceil_div(extent, width) : 0),
      row_stride(rows.stride(1)),
      batch_stride(rows.size(0) > 1 ? rows.stride(0) : 0) {}

char* Panels::at(int64_t b, int64_t panel, int64_t chunk) const {
  if (row_stride) {
    const int64_t element = b * batch_stride + begin(panel) * row_stride + chunk * kDepth;
    return static_cast<char*>(const_cast<void*>(storage.const_data_ptr())) +
           element * storage.element_size();
  }
  const int64_t before = (batch > 1 ? b * count : 0) + panel;
  const int64_t element = width * (before * padded_depth + chunk * kDepth);
  return static_cast<char*>(storage.mutable_data_ptr()) + element * storage.element_size();
}

namespace {

// One chunk of a row panel: out[f,k], k contiguous.
template <class Out, class In>
void fill_rows(Out* out, int64_t ld, int64_t n, int64_t depth, const In* x, int64_t sf, int64_t sk,
               const int64_t* pick) {
  if (sk == 1 && !pick) {
    for (int64_t f = 0; f < n; f++) convert(out + f * ld, x + f * sf, depth);
    return;
  }
  for (int64_t k0 = 0; k0 < depth; k0 += kLanes) {  // blocks, so that both sides stay in cache
    const int64_t k1 = std::min(k0 + kLanes, depth);
    for (int64_t f0 = 0; f0 < n; f0 += kLanes) {
      const int64_t f1 = std::min(f0 + kLanes, n);
      for (int64_t k = k0; k < k1; k++) {
        const In* from = x + (pick ? pick[k] : k) * sk;
        for (int64_t f = f0; f < f1; f++) out[f * ld + k] = static_cast<Out>(from[f * sf]);
      }
    }
  }
}

// One chunk of a column panel: out[k,f], f contiguous; for bf16 out[k/2,f,k%2].
template <class Out, class In>
void fill_columns(Out* out, int64_t ld, int64_t n, int64_t depth, const In* x, int64_t sf,
                  int64_t sk, const int64_t* pick) {
  constexpr int64_t pair = sizeof(Out) == 2 ? 2 : 1;
  auto row = [&](int64_t k) { return x + (pick ? pick[k] : k) * sk; };
  if (sf == 1 && pair == 1) {
    for (int64_t k = 0; k < depth; k++) convert(out + k * ld, row(k), n);
    return;
  }
  if constexpr (pair == 2 && std::is_same_v<Out, In>) {
    if (sf == 1) {
      for (int64_t k = 0; k + 1 < depth; k += 2) interleave(out + k * ld, row(k), row(k + 1), n);
      if (depth % 2) {
        for (int64_t f = 0; f < n; f++) out[(depth - 1) * ld + 2 * f] = row(depth - 1)[f];
      }
      return;
    }
  }
  for (int64_t f0 = 0; f0 < n; f0 += kLanes) {
    const int64_t f1 = std::min(f0 + kLanes, n);
    for (int64_t k = 0; k < depth; k++) {
      const In* from = row(k);
      Out* to = out + (k / pair) * pair * ld + k % pair;
      for (int64_t f = f0; f < f1; f++) to[f * pair] = static_cast<Out>(from[f * sf]);
    }
  }
}

template <class Out, class In>
void fill_block(const Panels& panels, int64_t b, int64_t panel, int64_t to, int64_t n,
                const Matrix& x, bool ones, bool last, const int64_t* pick, int64_t k0,
                int64_t k1) {
  constexpr int64_t pair = sizeof(Out) == 2 ? 2 : 1;
  const int64_t end = last ? panels.width : to + n + ones, block = k1 - k0;
  const int64_t chunk = k0 / kDepth, offset = k0 % kDepth;
  const int64_t ld =
      panels.columns ? panels.width : std::min(kDepth, panels.padded_depth - chunk * kDepth);
  Out* out = reinterpret_cast<Out*>(panels.at(b, panel, chunk)) +
             (panels.columns ? offset * panels.width : offset);
  const int64_t real = std::clamp<int64_t>(panels.depth - k0, 0, block);
  const In* in = reinterpret_cast<const In*>(x.data) + (pick ? 0 : k0 * x.sk);
  const int64_t* picked = pick ? pick + k0 : nullptr;
  auto cell = [&](int64_t f, int64_t k) -> Out& {
    return panels.columns ? out[(k / pair) * pair * ld + f * pair + k % pair] : out[f * ld + k];
  };
  if (panels.columns) {
    fill_columns(out + to * pair, ld, n, real, in, x.sf, x.sk, picked);
  } else {
    fill_rows(out + to * ld, ld, n, real, in, x.sf, x.sk, picked);
  }
  for (int64_t k = real; k < block; k++) {
    for (int64_t f = to; f < to + n; f++) cell(f, k) = Out(0);
  }
  for (int64_t f = to + n; f < end; f++) {
    for (int64_t k = 0; k < block; k++) cell(f, k) = Out(ones && f == to + n && k < real ? 1 : 0);
  }
}

Panels pack(const at::Tensor& x, bool columns, bool ones, const at::Tensor& pick) {
  const int64_t free_dim = columns ? 2 : 1, k_dim = columns ? 1 : 2;
  const int64_t extent = x.size(free_dim), depth = pick.defined() ? pick.numel() : x.size(k_dim);
  const int64_t* picked = pick.defined() ? pick.const_data_ptr<int64_t>() : nullptr;
  Panels panels(columns, x.size(0), extent + ones, depth, compute_dtype(x.scalar_type()));
  // A few k at a time across all panels: both sides are then read and written as streams.
  const int64_t blocks = ceil_div(panels.padded_depth, kBlock);
  at::parallel_for(0, panels.batch * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; u++) {
      const int64_t b = u / blocks, k = u % blocks * kBlock;
      for (int64_t p = 0; p < panels.count; p++) {
        const int64_t from = panels.begin(p);
        const int64_t n = std::clamp<int64_t>(extent - from, 0, panels.width);
        const bool one = ones && from + panels.width > extent;
        panels.fill(b, p, 0, n, Matrix(x, free_dim, k_dim, b, from), one, true, picked, k,
                    std::min(k + kBlock, panels.padded_depth));
      }
    }
  });
  return panels;
}

}  // namespace

void Panels::fill(int64_t b, int64_t panel, int64_t to, int64_t n, const Matrix& x, bool ones,
                  bool last, const int64_t* pick, int64_t k0, int64_t k1) {
  auto from = [&]<class In>(In) {
    if constexpr (std::is_same_v<In, double>) {
      fill_block<double, In>(*this, b, panel, to, n, x, ones, last, pick, k0, k1);
    } else if (storage.scalar_type() == at::kFloat) {
      fill_block<float, In>(*this, b, panel, to, n, x, ones, last, pick, k0, k1);
    } else if constexpr (!std::is_same_v<In, at::Half>) {
      fill_block<at::BFloat16, In>(*this, b, panel, to, n, x, ones, last, pick, k0, k1);
    }
  };
  switch (x.dtype) {
    case at::kFloat: return from(float{});
    case at::kDouble: return from(double{});
    case at::kBFloat16: return from(at::BFloat16{});
    default: return from(at::Half{});
  }
}

Panels pack_rows(const at::Tensor& x, bool ones, const at::Tensor& pick) {
  const auto dtype = compute_dtype(x.scalar_type());
  // bf16 is multiplied in pairs of k: the second of an odd last pair would be another row's.
  const bool whole = dtype == at::kFloat || (dtype == at::kBFloat16 && x.size(2) % 2 == 0);
  if (whole && x.scalar_type() == dtype && x.stride(2) == 1 && x.stride(1) > 0 && !ones &&
      !pick.defined()) {
    return Panels(x);
  }
  return pack(x, false, ones, pick);
}

Panels pack_columns(const at::Tensor& x, bool ones, const at::Tensor& pick) {
  return pack(x, true, ones, pick);
}

template <class Acc>
void multiply(const Panels& A, int64_t a, int64_t i, const Panels& B, int64_t b, int64_t j,
              Acc* C) {
  namespace blas = at::native::cpublas;
  const int64_t M = A.lines(i), N = B.width;
  if (A.padded_depth == 0) std::fill_n(C, M * N, Acc(0));
  for (int64_t k = 0, chunk = 0; k < A.padded_depth; k += kDepth, chunk++) {
    const int64_t K = std::min(kDepth, A.padded_depth - k);
    const int64_t row = A.row_stride ? A.row_stride : K;
    const void *x = A.at(a, i, chunk), *y = B.at(b, j, chunk);
    if constexpr (std::is_same_v<Acc, double>) {
      auto wrap = [](const void* data, int64_t rows, int64_t columns) {
        return at::from_blob(const_cast<void*>(data), {rows, columns}, at::dtype(at::kDouble));
      };
      at::Tensor out = wrap(C, M, N);
      at::addmm_out(out, out, wrap(x, M, K), wrap(y, K, N), k > 0);
    } else if (A.storage.scalar_type() == at::kBFloat16) {
      blas::brgemm(M, N, K, row, N, N, k > 0, static_cast<const at::BFloat16*>(x),
                   static_cast<const at::BFloat16*>(y), C, true);
    } else {
      blas::brgemm(M, N, K, row, N, N, k > 0, static_cast<const float*>(x),
                   static_cast<const float*>(y), C, false);
    }
  }
}

template void multiply(const Panels&, int64_t, int64_t, const Panels&, int64_t, int64_t, float*);
template void multiply(const Panels&, int64_t, int64_t, const Panels&, int64_t, int64_t, double*);

void release(const Panels& A) {
  const auto dtype = A.storage.scalar_type();
  if (dtype != at::kDouble) at::native::cpublas::brgemm_release(dtype == at::kBFloat16);
}

}  // namespace ekfac_fast
