"""What a module computes: W x + b, by whose code, and rows of W for ids."""

import sys

import torch
from torch import Tensor, nn


def weights(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """W [O,I] of a linear layer, and b in fp32, if it has one."""
    W, b = module.weight, module.bias
    assert isinstance(W, Tensor)
    return W.t() if is_conv1d(module) else W, b.float() if isinstance(b, Tensor) else None


@torch.no_grad()
def is_product(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Whether y [...,O] is W x + b of every row x [...,I], as far as y's dtype tells: one bool."""
    W, b = weights(module)
    with torch.autocast(x.device.type, enabled=False):
        error = (nn.functional.linear(x.float(), W.float(), b) - y.float()).abs()
    slack = max(1e-3, 8 * torch.finfo(y.dtype).eps) * y.abs().max()
    return (error <= slack).all()


def is_embedding(module: nn.Module) -> bool:
    """Whether a module looks up rows of its weight, and the gradient of each is what arrives."""
    return (
        isinstance(module, nn.Embedding)
        and type(module).forward is nn.Embedding.forward
        and module.max_norm is None
        and not module.scale_grad_by_freq
    )


def is_plain(module: nn.Module) -> bool:
    """Whether a layer computes W x + b by the code of `nn.Linear` or `Conv1D` itself (or W^T x, by
    that of `nn.Embedding`).
    """
    if type(module).forward is nn.Linear.forward or is_embedding(module):
        return True
    return is_conv1d(module) and type(module).__module__ == "transformers.pytorch_utils"


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is Hugging Face's `Conv1D`: a linear layer with a transposed weight."""
    # No transformers module can exist before transformers is imported.
    if "transformers" not in sys.modules:
        return False
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
