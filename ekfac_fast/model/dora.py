"""DoRA's magnitudes as peft computes with them: y = (m / n - 1) W x + (m / n) s B A x, n constant.

They belong to a module of their own, whose output is added to W x. A row of m's gradient is u times
what arrives at y, where u = (W x + s B A x) / n = (y + W x) / m.
"""

import sys
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

# peft's dictionary of these modules, one an adapter.
HELD = ".lora_magnitude_vector."


def is_dora(module: nn.Module) -> bool:
    """Whether a module holds the magnitudes of a linear layer."""
    # No module of peft's can exist before peft is imported.
    if "peft" not in sys.modules:
        return False
    from peft.tuners.lora.dora import DoraLinearLayer

    return type(module).forward is DoraLinearLayer.forward


def multiplied(module: Any, x: Tensor, given: dict, y: Tensor) -> Tensor:
    """u, of what the module is given (x, and by name) and returned."""
    base, Wx = given["base_layer"], given.get("base_result")
    if Wx is None:  # of an adapter that trains, with dropout
        from peft.utils.integrations import dequantize_module_weight

        W = dequantize_module_weight(base).to(y.dtype)
        Wx = F.linear(x, W.mT if module.fan_in_fan_out else W)
    elif base.bias is not None:
        Wx = Wx - base.bias
    return (y + Wx) / module.weight
