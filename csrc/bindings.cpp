// Module `ekfac_fast._C`: loading it registers the CPU (and CUDA) kernels with PyTorch's dispatcher.
// Ops are called through the dispatcher; pybind11 carries only `build_info`, for `doctor`.
#include <ATen/cpu/Utils.h>
#include <ATen/native/CPUBlas.h>
#include <pybind11/pybind11.h>
#include <torch/version.h>

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#endif
  info["avx2"] = at::cpu::is_avx2_supported();
  info["avx512"] = at::cpu::is_avx512_supported();
  info["avx512_bf16"] = at::cpu::is_avx512_bf16_supported();
  info["amx_tile"] = at::cpu::is_amx_tile_supported();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "Compiler, torch version and this CPU's instruction sets.");
}
