"""Routed experts: the matrices of all experts are one parameter [E,O,I], and a token meets a few.

transformers 5 marks such modules (`use_experts_implementation`) and says with them how the
parameters lie. In a pass every expert runs on the tokens that are routed to it, in their order, so
that it is known of each row which token it is; W[e] is a layer named `<module>.<parameter>.<e>`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .rows import Rows

# (parameter, expert, x, y) -> y: one product y = W[e] x + b[e].
Record = Callable[[str, int, Tensor, Tensor], Tensor]
MARKS = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate", "down_proj")


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds routed experts as transformers marks them, in numbers that are there
    (not packed).
    """
    if not all(hasattr(module, mark) for mark in MARKS):
        return False
    held = [getattr(module, name, None) for name in (_first(module), "down_proj")]
    return all(isinstance(p, nn.Parameter) and p.ndim == 3 and p.is_floating_point() for p in held)


def matrices(module: Any) -> dict[str, tuple[int, int, bool]]:
    """I, O and bias of an expert's matrices, by their parameter."""
    found = {}
    for name in (_first(module), "down_proj"):
        sizes = getattr(module, name).shape[1:]
        I, O = sizes if module.is_transposed else sizes[::-1]
        found[name] = int(I), int(O), bool(module.has_bias)
    return found


def parameters(module: nn.Module, name: str) -> list[nn.Parameter]:
    """W of all experts, and their biases if they have some."""
    held = (getattr(module, x, None) for x in (name, f"{name}_bias"))
    return [p for p in held if isinstance(p, nn.Parameter)]


def _first(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


class Routing:
    """Which tokens each expert gets, in their order, in one call of a module of experts.

    Args:
        hidden: the tokens, [N,H].
        index: every token's experts, [N,K]; numbers from `experts` on stand for none.
    """

    def __init__(self, hidden: Tensor, index: Tensor, experts: int) -> None:
        self.shape, self.like = hidden.shape, hidden.new_zeros(())
        chosen, K = index.reshape(-1), index.shape[-1]
        sizes = torch.bincount(chosen, minlength=experts)[:experts].tolist()
        pairs = chosen.argsort(stable=True)[: sum(sizes)]
        self.tokens = (pairs // K).split(sizes)
        self.choices = (pairs % K).split(sizes)
        self._places: Places | None = None

    def places(self, numbered: Callable[[Tensor], Tensor]) -> "Places":
        """Rows by sequence; `numbered` makes [B,P,1] of one number a token, [N,1]."""
        if self._places is None:
            N = self.shape[0]
            by_sequence = numbered(torch.arange(N, device=self.like.device).unsqueeze(1))[..., 0]
            self._places = Places(self.tokens, by_sequence)
        return self._places


class Places:
    """Rows of every expert by sequence: [n,F] -> [B,width,F], zero where a sequence has fewer.

    Args:
        tokens: which tokens each expert got.
        by_sequence: the number of the token at every position, [B,P].
    """

    def __init__(self, tokens: tuple[Tensor, ...], by_sequence: Tensor) -> None:
        self.sequences, self.positions = by_sequence.shape
        place = torch.empty_like(by_sequence.flatten())
        place[by_sequence.flatten()] = torch.arange(len(place), device=place.device)
        sizes = [len(x) for x in tokens]
        every = place[torch.cat(tokens)]
        sequence, position = every // self.positions, every % self.positions
        expert = torch.cat([x.new_full((len(x),), e) for e, x in enumerate(tokens)])
        key = expert * self.sequences + sequence
        counts = torch.bincount(key, minlength=len(sizes) * self.sequences)
        order, rank = key.argsort(stable=True), torch.empty_like(key)
        starts = counts.cumsum(0) - counts
        rank[order] = torch.arange(len(key), device=key.device) - starts[key[order]]
        self.counts = [tuple(x) for x in counts.view(len(sizes), -1).tolist()]
        self._widths = [max(1, *x) for x in self.counts]
        self._rows = list(zip(sequence.split(sizes), rank.split(sizes), strict=True))
        self._positions = position.split(sizes)
        self._made: dict[int, Tensor] = {}

    def of(self, expert: int) -> Tensor:
        """The position of every row of an expert, [B,width]; -1 where there is none."""
        if expert not in self._made:
            position = self._positions[expert]
            made = position.new_full((self.sequences, self._widths[expert]), -1)
            made[self._rows[expert]] = position
            self._made[expert] = made
        return self._made[expert]

    def spread(self, x: Tensor, expert: int) -> Tensor:
        """[n,F] -> [B,width,F]."""
        spread = x.new_zeros(self.sequences, self._widths[expert], x.shape[-1])
        spread[self._rows[expert]] = x
        return spread


def by_sequence(
    expert: int,
    uses: list[tuple[Routing, Tensor, Tensor]],
    numbered: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Rows]:
    """a [B,rows,I], g [B,rows,O] and what their rows stand for.

    Rows of several uses stand end to end. `numbered` as in `Routing.places`.
    """
    found = []
    for routing, a, g in uses:
        spread = routing.places(numbered)
        found.append((spread.spread(a, expert), spread.spread(g, expert), spread.of(expert)))
    if len(found) > 1:
        a, g, places = (torch.cat(side, 1) for side in zip(*found, strict=True))
        return a, g, Rows(len(a), spread.positions, places=places)
    # The very places: both matrices of an expert share what is made of them.
    a, g, places = found[0]
    counts = spread.counts[expert]
    return a, g, Rows(len(a), spread.positions, places=places, counts=counts)


def forward(
    module: Any, record: Record, hidden: Tensor, routing: Routing, weights: Tensor
) -> Tensor:
    """The output of experts, [N,H], by weights [N,K] of what each token meets."""
    out = torch.zeros_like(hidden)
    for e, (tokens, choices) in enumerate(zip(routing.tokens, routing.choices, strict=True)):
        if not len(tokens):
            continue
        x = _product(module, record, _first(module), e, hidden[tokens])
        x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
        x = _product(module, record, "down_proj", e, x)
        if getattr(module, "has_post_expert_norm", False):
            x = module.post_expert_norm(x)
        out = out.index_add(0, tokens, (x * weights[tokens, choices, None]).to(out.dtype))
    return out


def _product(module: Any, record: Record, name: str, e: int, x: Tensor) -> Tensor:
    """W[e] x + b[e] of some rows, recorded."""
    W, *b = (p[e] for p in parameters(module, name))
    return record(name, e, x, nn.functional.linear(x, W.t() if module.is_transposed else W, *b))


def check(name: str, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
    """Refuse experts that are called otherwise than transformers' own implementations are.

    Raises:
        ModelError: names the module.
    """
    fits = hidden.ndim == index.ndim == 2 and index.shape == weights.shape
    if not fits or len(index) != len(hidden) or getattr(module, "_is_expert_parallel", False):
        raise ModelError(
            f"{name} ({type(module).__name__}): experts called with {list(hidden.shape)}, "
            f"{list(index.shape)} and {list(weights.shape)}; expected [N,H], [N,K] and [N,K], and "
            "all experts on one device. Leave them out of `layers`"
        )


@torch.no_grad()
def verify(name: str, module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
    """Refuse experts whose own code, one expert after the other, gives something else.

    Raises:
        ModelError: names the module.
    """
    written = type(module).forward
    own = getattr(written, "__wrapped__", written)(module, *given)
    slack = max(1e-3, 8 * torch.finfo(out.dtype).eps) * own.abs().max()
    if not bool(((own - out).abs() <= slack).all()):
        raise ModelError(
            f"{name} ({type(module).__name__}) does not compute what its marks say; leave its "
            "experts out of `layers`"
        )


@contextmanager
def running(name: str, module: nn.Module, called: Callable[..., Tensor]) -> Iterator[None]:
    """`called(hidden, index, weights)` in the place of a module's forward pass.

    Raises:
        ModelError: something else is there already.
    """
    if "forward" in vars(module):
        raise ModelError(
            f"{name} ({type(module).__name__}): its forward pass has been replaced already (by a "
            "hook of accelerate's?); leave its experts out of `layers`"
        )
    module.forward = lambda *args, **kwargs: called(*args, *kwargs.values())
    try:
        yield
    finally:
        del module.forward
