// What all launchers share: operands as kernels see them, the launch, the second stage of a sum.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <string>

#include "../check.h"
#include "gradient_tile.cuh"

#ifdef __CUDACC__
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

namespace ekfac_fast::cuda {

constexpr auto kKey = c10::DispatchKey::CUDA;

inline int processors() {
  int device = 0, count = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// On the current stream of the current device; nothing waits.
template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, int shared, const A&... args) {
  // What is beyond 48 KiB has to be asked for.
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  kernel<<<blocks, threads, shared, c10::cuda::getCurrentCUDAStream()>>>(args...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace ekfac_fast::cuda

#endif

namespace ekfac_fast::cuda {

// Registers `function` as ekfac_fast_cuda::<name>, with the schema of the op's card: beside the
// Triton kernel, which keeps the CUDA key of ekfac_fast::<name> until both are measured on a GPU.
template <class Function>
void beside(torch::Library& library, const std::string& name, Function* function) {
  const auto card =
      c10::Dispatcher::singleton().findSchemaOrThrow(("ekfac_fast::" + name).c_str(), "");
  library.def(card.schema().cloneWithName("ekfac_fast_cuda::" + name, ""));
  library.impl(name.c_str(), torch::dispatch(kKey, function));
}

// run(E) with the element type of x.
template <class Run>
void by_dtype(const at::Tensor& x, const Run& run) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf,
                   "operands are ", x.scalar_type(), ", expected bfloat16 or float16");
  x.scalar_type() == at::kHalf ? run(Fp16{}) : run(Bf16{});
}

template <class E>
const E* data(const at::Tensor& x) {
  return static_cast<const E*>(x.const_data_ptr());
}

// Of `aligned` tensors.
template <class E>
Layer<E> layer(const at::Tensor& g, const at::Tensor& a, bool ones) {
  return {data<E>(g),
          data<E>(a),
          g.stride(0),
          g.stride(1),
          a.stride(0),
          a.stride(1),
          static_cast<int>(g.size(1)),
          static_cast<int>(g.size(2)),
          static_cast<int>(a.size(2)),
          ones};
}
template <class E>
Matrix<E> matrix(const at::Tensor& x, bool ones = false) {
  return {data<E>(x), x.stride(0), static_cast<int>(x.size(0)), static_cast<int>(x.size(1)), ones};
}

// Whether [rows,columns], `times` over, is enough work in tiles of 128 for every processor.
inline bool wide(int64_t rows, int64_t columns, int64_t times) {
  return std::min(rows, columns) > 64 &&
         cdiv(rows, 128) * cdiv(columns, 128) * times >= 2 * processors();
}

// s += sums.sum(-1): the second stage of scores.
inline void fold(const at::Tensor& s, const at::Tensor& sums) {
  const at::Tensor out = s.contiguous();
  launch(fold_kernel<4>, cdiv(out.numel(), 4), 128, 0, out.mutable_data_ptr<float>(),
         sums.const_data_ptr<float>(), out.numel(), sums.numel() / out.numel());
  if (!out.is_same(s)) s.copy_(out);
}

// The ending's `close` for every tile of every sequence of aligned x and y: ending(n) makes it, n
// being the number of warps that close a sequence. Tiles of 64 where few of `Large` would not fill
// the chip.
template <class Large, class E, class Make>
void close_tiles(const at::Tensor& x, const at::Tensor& y, bool ones, const Make& ending) {
  const Layer<E> on = layer<E>(x, y, ones);
  auto run = [&]<class Tiling>(Tiling) {
    const int64_t tiles = on.template tiles<Tiling>();
    launch(gradient_tile_kernel<Tiling, E, decltype(ending(0))>, tiles * x.size(0), Tiling::threads,
           Tiling::shared, on, ending(tiles * Tiling::warps));
  };
  wide(on.O, on.J(), x.size(0)) ? run(Large{}) : run(Small{});
}

}  // namespace ekfac_fast::cuda
