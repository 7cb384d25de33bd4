// Module `ekfac_fast._C`: loading it registers the CPU kernels with the dispatcher, through which
// ops are called; pybind11 carries only `build_info`, for `doctor`.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "cpu/isa.h"

namespace {

using namespace ekfac_fast;

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#endif
  info["avx2"] = cpu::has_avx2();
  info["avx512"] = cpu::has_avx512();
  info["bf16 products"] = cpu::has_bf16_products();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "Compiler, torch version and this CPU's instruction sets.");
}
