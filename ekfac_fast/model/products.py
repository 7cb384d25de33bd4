"""What a module computes: W x + b, by whose code, and rows of W for ids."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from .weights import is_packed

# Their hooks leave outputs as they are, and what their modules do a configuration says.
LIBRARIES = ("ekfac_fast", "torch", "accelerate", "transformers", "peft")


def weights(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """W [O,I] of a linear layer, and b in fp32, if it has one."""
    W, b = module.weight, module.bias
    assert isinstance(W, Tensor)
    return W.t() if is_conv1d(module) else W, b.float() if isinstance(b, Tensor) else None


def near(x: Tensor, y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Whether x is y of the same shape, as far as y's dtype (or another) tells: one bool."""
    if x.shape != y.shape:
        return torch.tensor(False)
    x, wide = x.detach().float(), y.detach().float()
    slack = max(1e-3, 8 * torch.finfo(dtype or y.dtype).eps) * wide.abs().max()
    return ((x - wide).abs() <= slack).all()


@torch.no_grad()
def is_product(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Whether y [...,O] is W x + b of every row x [...,I], as far as y's dtype tells: one bool."""
    W, b = weights(module)
    with torch.autocast(x.device.type, enabled=False):
        return near(nn.functional.linear(x.float(), W.float(), b), y)


def seems_product(module: nn.Module, x: Tensor, y: Tensor, I: int, O: int) -> Tensor:
    """Whether the first row of y [...,O] is W x + b: one bool.

    True of a weight that is not at hand, packed or elsewhere: a product all the same.
    """
    weight = module.weight
    if not isinstance(weight, Tensor) or is_packed(weight) or weight.is_meta:
        return torch.tensor(True)
    # Rows of a block-diagonal layer are of other sizes than its weight.
    if (x.shape[-1], y.shape[-1]) != (I, O):
        return torch.tensor(False)
    return is_product(module, *(t.detach().reshape(-1, t.shape[-1])[:1] for t in (x, y)))


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
    that of `nn.Embedding`), and no hook of a user's may change it.
    """
    changes = (hook for hook in module._forward_hooks.values() if not of_library(hook))
    if own_forward(module) is not None or next(changes, None) is not None:
        return False
    if type(module).forward is nn.Linear.forward or is_embedding(module):
        return True
    return is_conv1d(module) and type(module).__module__ == "transformers.pytorch_utils"


def own_forward(module: nn.Module) -> Any:
    """A forward pass that was given to the module itself, None where it runs its class's."""
    # accelerate keeps what it wraps.
    own = vars(module).get("_old_forward", vars(module).get("forward"))
    return None if getattr(own, "__func__", None) is type(module).forward else own


def of_library(hook: Any) -> bool:
    """Whether a hook is ours, or of a library that leaves outputs as they are."""
    place = str(getattr(getattr(hook, "func", hook), "__module__", ""))
    return place.partition(".")[0] in LIBRARIES


def of_libraries(model: nn.Module) -> bool:
    """Whether every module of a model is of a library's class, and runs its forward pass."""
    return all(
        type(module).__module__.partition(".")[0] in LIBRARIES and own_forward(module) is None
        for module in model.modules()
    )


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is Hugging Face's `Conv1D`: a linear layer with a transposed weight."""
    # No transformers module can exist before transformers is imported.
    if "transformers" not in sys.modules:
        return False
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
