"""Triton kernels of ekfac_fast, installed as `ekfac_fast.triton_kernels`.

`triton_kernels` alone is another package's import name (triton-lang's): the bare name is refused.
"""

if __name__ == "triton_kernels":
    raise ImportError(
        "this folder is `ekfac_fast.triton_kernels`; `triton_kernels` is another package's name. "
        "Run Python from another folder, or import `ekfac_fast.triton_kernels`."
    )
