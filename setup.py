"""Build `ekfac_fast._C` where torch can be imported; otherwise install the reference tier only.

Everything else about the package is in pyproject.toml. The extension is compiled against the torch
it will run with, so it needs `pip install --no-build-isolation`; an isolated build has no torch,
and gives a package on plain torch kernels (`python -m ekfac_fast doctor` says which tier runs).

EKFAC_FAST_CUDA=1 adds csrc/cuda as `torch.ops.ekfac_fast_cuda.*`, beside the Triton kernels that
`torch.ops.ekfac_fast.*` runs on a GPU: for measuring one against the other.
"""

import os
from glob import glob
from importlib.util import find_spec

from setuptools import setup

CUDA = os.environ.get("EKFAC_FAST_CUDA") == "1"


def extension() -> dict:
    """The keyword arguments that add the compiled tier, or none without torch."""
    if find_spec("torch") is None:
        if CUDA:
            raise SystemExit("EKFAC_FAST_CUDA=1 needs torch at build time: --no-build-isolation")
        return {}
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    sources = sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp"))
    kind, flags = CppExtension, {"cxx": ["-O3", "-g0", "-std=c++20", "-Wall", "-fopenmp"]}
    if CUDA:
        if not (torch.version.cuda and CUDA_HOME):
            here = (
                f"torch {torch.__version__}, nvcc {'in ' + CUDA_HOME if CUDA_HOME else 'nowhere'}"
            )
            raise SystemExit(f"EKFAC_FAST_CUDA=1 needs a torch with CUDA, and nvcc; found {here}")
        # Code for A100 and Hopper, and PTX from which the driver makes code for what is newer.
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0a")
        kind, flags["nvcc"] = CUDAExtension, ["-O3", "-std=c++20"]
        sources += sorted(glob("csrc/cuda/*.cpp") + glob("csrc/cuda/*.cu"))
    # at::parallel_for is a header: it must see the threading that torch itself was built with.
    macros = [("AT_PARALLEL_OPENMP", "1")] if torch.backends.openmp.is_available() else []
    return {
        "ext_modules": [
            kind(
                "ekfac_fast._C",
                sources,
                include_dirs=[os.path.abspath("csrc")],
                define_macros=macros,
                extra_compile_args=flags,
                extra_link_args=["-fopenmp"],
                depends=glob("csrc/**/*.h", recursive=True) + glob("csrc/cuda/*.cuh"),
            )
        ],
        "cmdclass": {"build_ext": BuildExtension},
    }


setup(**extension())
