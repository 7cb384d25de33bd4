"""Build `ekfac_fast._C` where torch can be imported; otherwise install the reference tier only.

Everything else about the package is in pyproject.toml. The extension is compiled against the torch
it will run with, so it needs `pip install --no-build-isolation`; an isolated build has no torch,
and gives a package on plain torch kernels (`python -m ekfac_fast doctor` says which tier runs).
"""

import os
from glob import glob
from importlib.util import find_spec

from setuptools import setup


def extension() -> dict:
    """The keyword arguments that add the compiled tier, or none without torch."""
    if find_spec("torch") is None:
        return {}
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    # at::parallel_for is a header: it must see the threading that torch itself was built with.
    macros = [("AT_PARALLEL_OPENMP", "1")] if torch.backends.openmp.is_available() else []
    return {
        "ext_modules": [
            CppExtension(
                "ekfac_fast._C",
                sorted(glob("csrc/**/*.cpp", recursive=True)),
                include_dirs=[os.path.abspath("csrc")],
                define_macros=macros,
                extra_compile_args=["-O3", "-g0", "-std=c++20", "-Wall", "-fopenmp"],
                extra_link_args=["-fopenmp"],
                depends=glob("csrc/**/*.h", recursive=True),
            )
        ],
        "cmdclass": {"build_ext": BuildExtension},
    }


setup(**extension())
