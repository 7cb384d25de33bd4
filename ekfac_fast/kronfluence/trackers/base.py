"""From kronfluence's hooks to (g, a) in the shapes of our ops: what every tracker shares.

    a  [B,T,I]  the input of the module, copied in the forward pass
    g  [B,T,O]  the gradient at its output; T = 1 for a module that sees one row per example

A module that is called several times in one forward pass (`has_shared_parameters`) has as many
pairs per batch. Its per-example gradient is the sum over them: where an ending is not linear in
that sum, the pairs are joined along T, which is the same sum.
"""

import threading
import weakref

import torch
from kronfluence.module.tracker.base import BaseTracker
from torch import Tensor, nn

from ...errors import ModelError

_last = threading.local()


def private_copy(x: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy of `x` that later in-place operations cannot reach, in `dtype` on `device`.

    Modules that read the same tensor one after the other (q, k and v; gate and up) share one copy
    for as long as any of them holds it.
    """
    key = (x._version, dtype, device)
    held = getattr(_last, "copy", None)
    if held is not None and held[0]() is x and held[2] == key:
        copy = held[1]()
        if copy is not None:
            return copy
    copy = x.detach().to(device=device, dtype=dtype, copy=True)
    _last.copy = (weakref.ref(x), weakref.ref(copy), key)
    return copy


def by_tokens(x: Tensor) -> Tensor:
    """[B,...,F] as [B,T,F]."""
    return x.unsqueeze(1) if x.ndim == 2 else x.reshape(x.shape[0], -1, x.shape[-1])


class BatchSize:
    """How many examples the pass that runs now has, as far as the model's own inputs tell."""

    def __init__(self) -> None:
        self.examples: int | None = None

    def see(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        """The forward pre-hook of a whole model."""
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 1)
        self.examples = next((len(x) for x in tensors), None)

    def check(self, name: str, x: Tensor) -> None:
        """Refuse inputs whose first axis does not hold the examples.

        Raises:
            ModelError: tokens are rows, or positions come first: kronfluence would take each for an
                example of its own.
        """
        if self.examples is not None and len(x) != self.examples:
            raise ModelError(
                f"module {name!r}: its input is {list(x.shape)} for {self.examples} examples: rows "
                "are not examples there, and kronfluence's scores of it are not scores of "
                "examples. Leave it out of Task.get_influence_tracked_modules, or score with "
                "ekfac_fast.score, which maps rows to sequences"
            )


class TokenTracker(BaseTracker):
    """A kronfluence tracker that hands each (g, a) of its module to `consume`."""

    # False: `consume` is linear in the gradient, so uses of a shared module may come one by one.
    joins_uses = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.input_ndim = 0
        self.cached_activations: Tensor | list[Tensor] | None = None
        # The pairs of a shared module in this batch, until `finalize_iteration` joins them.
        self.uses: list[tuple[Tensor, Tensor]] = []

    def operand_dtype(self) -> torch.dtype:
        """The dtype of g and a."""
        raise NotImplementedError

    def offloads(self) -> bool:
        """Whether inputs wait for the backward pass in CPU memory."""
        raise NotImplementedError

    def consume(self, g: Tensor, a: Tensor) -> None:
        """Do this stage's work on one batch (or one use) of the module."""
        raise NotImplementedError

    def finished(self, name: str, factor: Tensor) -> Tensor:
        """`factor` as kronfluence collects it: its dtype, its scale."""
        del name
        return factor

    def register_hooks(self) -> None:
        """Install the forward hook; it hangs a gradient hook on every output."""
        module = self.module

        @torch.compiler.disable
        @torch.no_grad()
        def forward(_: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
            x = inputs[0]
            module.batch_size.check(module.name, x)
            device = torch.device("cpu") if self.offloads() else x.device
            a = private_copy(x, self.operand_dtype(), device)
            self.input_ndim = x.ndim
            if module.factor_args.has_shared_parameters:
                self.cached_activations = [*(self.cached_activations or []), a]
            else:
                self.cached_activations = a
            self.cached_hooks.append(outputs.register_hook(backward))

        @torch.no_grad()
        def backward(gradient: Tensor) -> None:
            if self.cached_activations is None:
                self._raise_cache_not_found_exception()
            self.cached_hooks.pop().remove()
            cached = self.cached_activations
            a = cached.pop() if isinstance(cached, list) else cached
            assert a is not None
            g = by_tokens(gradient.detach().to(self.operand_dtype()))
            a = by_tokens(a.to(gradient.device))
            if not isinstance(cached, list):
                self.clear_all_cache()
                self.consume(g, a)
            elif self.joins_uses:
                self.uses.append((g, a))
            else:
                self.consume(g, a)

        self.registered_hooks.append(module.register_forward_hook(forward))

    @torch.no_grad()
    def finalize_iteration(self) -> None:
        """End of a batch; kronfluence calls it only with `has_shared_parameters`."""
        if self.uses:
            g, a = (torch.cat(side, dim=1) for side in zip(*self.uses, strict=True))
            self.uses.clear()
            self.consume(g, a)
        self.clear_all_cache()

    def clear_all_cache(self) -> None:
        """Drop what a batch left: inputs, gradient hooks, uses."""
        super().clear_all_cache()
        self.uses.clear()

    @property
    def bias(self) -> bool:
        """Whether the module has a bias."""
        return self.module.original_module.bias is not None

    @property
    def sizes(self) -> tuple[int, int]:
        """O and J of the module."""
        return self.module.out_features, self.module.in_features + self.bias


class ScoreTracker(TokenTracker):
    """What those of queries and scores share, by kronfluence's `ScoreArguments`."""

    def operand_dtype(self) -> torch.dtype:
        """The wider of the two dtypes that kronfluence would pass through."""
        args = self.module.score_args
        return torch.promote_types(args.per_sample_gradient_dtype, args.precondition_dtype)

    def offloads(self) -> bool:
        """As `offload_activations_to_cpu` says."""
        return self.module.score_args.offload_activations_to_cpu
