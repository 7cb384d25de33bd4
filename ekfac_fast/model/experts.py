"""Routed experts: the matrices of all experts are one parameter [E,O,I], and a token meets a few.

transformers 5 marks such modules (`use_experts_implementation`) and says with them how the
parameters lie. In a pass every expert runs on the tokens that are routed to it, in their order, so
that it is known of each row which token it is; W[e] is a layer named `<module>.<parameter>.<e>`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..data.batches import text_config
from ..errors import ModelError
from .products import near
from .rows import Rows

# (parameter, expert, x, y) -> y: one product y = W[e] x + b[e].
Record = Callable[[str, int, Tensor, Tensor], Tensor]
MARKS = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")
# What configurations call the experts that a token meets.
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
# Of Llama 4, unmarked: given all tokens once for each expert, [E*N,H], those of others as zeros.
BY_EXPERT = "Llama4TextExperts"


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds routed experts as transformers marks them, in numbers that are there
    (not packed).
    """
    if not _by_expert(module) and not all(hasattr(module, mark) for mark in MARKS):
        return False
    held = [getattr(module, name, None) for name in _names(module)]
    return all(isinstance(p, nn.Parameter) and p.ndim == 3 and p.is_floating_point() for p in held)


def matrices(module: Any) -> dict[str, tuple[int, int, bool]]:
    """I, O and bias of an expert's matrices, by their parameter."""
    found = {}
    for name in _names(module):
        sizes = getattr(module, name).shape[1:]
        I, O = sizes if transposed(module) else sizes[::-1]
        found[name] = int(I), int(O), bool(getattr(module, "has_bias", False))
    return found


def share(module: Any, model: nn.Module) -> float:
    """Of the tokens, how many come to an expert on average, by a configuration; else all."""
    for of in (module, model):
        config = text_config(of)
        for name in TOP_K:
            if isinstance(top := getattr(config, name, None), int):
                return min(1.0, top / int(module.num_experts))
    return 1.0


def parameters(module: nn.Module, name: str) -> list[nn.Parameter]:
    """W of all experts, and their biases if they have some."""
    W, b = (getattr(module, x, None) for x in (name, f"{name}_bias"))
    # Of a W that is made of others there is a bias alone.
    return [p for p in (W, b) if isinstance(p, nn.Parameter)] if isinstance(W, nn.Parameter) else []


def _by_expert(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ == BY_EXPERT and kind.__module__.startswith("transformers.")


def transposed(module: Any) -> bool:
    """Whether W[e] lies as [I,O]."""
    return _by_expert(module) or bool(module.is_transposed)


def _names(module: Any) -> tuple[str, str]:
    gated = _by_expert(module) or module.has_gate
    return ("gate_up_proj" if gated else "up_proj"), "down_proj"


class Routing:
    """Which tokens each expert gets, in their order, in one call of a module of experts.

    Args:
        tokens: of every expert.
        choices: which of a token's K experts it is, of every expert; None where tokens come by
            expert.
        hidden: what the module is given.
        N: how many tokens there are.
    """

    def __init__(
        self,
        tokens: tuple[Tensor, ...],
        choices: tuple[Tensor, ...] | None,
        hidden: Tensor,
        N: int,
    ) -> None:
        self.tokens, self.choices = tokens, choices
        self.shape, self.like = torch.Size((N, hidden.shape[-1])), hidden.new_zeros(())
        self._places: Places | None = None

    @classmethod
    def chosen(cls, hidden: Tensor, index: Tensor, experts: int) -> Self:
        """By every token's experts, [N,K]; numbers from `experts` on stand for none."""
        chosen, K = index.reshape(-1), index.shape[-1]
        sizes = torch.bincount(chosen, minlength=experts)[:experts].tolist()
        pairs = chosen.argsort(stable=True)[: sum(sizes)]
        tokens, choices = ((pairs // K).split(sizes), (pairs % K).split(sizes))
        return cls(tokens, choices, hidden, len(hidden))

    @classmethod
    def by_expert(cls, hidden: Tensor, experts: int) -> Self:
        """By tokens [E*N,H] that are not zero."""
        there = (hidden.view(experts, -1, hidden.shape[-1]) != 0).any(-1)
        tokens = there.nonzero()[:, 1].split(there.sum(1).tolist())
        return cls(tokens, None, hidden, there.shape[1])

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

    def filled(self, expert: int) -> Tensor:
        """Where an expert's tokens stand in the flat [B * width], in their order."""
        sequence, rank = self._rows[expert]
        return sequence * self._widths[expert] + rank

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
    counts, filled = spread.counts[expert], spread.filled(expert)
    rows = Rows(len(a), spread.positions, places=places, counts=counts, filled=filled)
    return a, g, rows


def forward(
    module: Any, record: Record, routing: Routing, hidden: Tensor, *given: Tensor
) -> Tensor:
    """The output of experts for hidden [N,H], the index [N,K] and the weights [N,K] of what each
    token meets, or for [E*N,H] alone.
    """
    by_expert = routing.choices is None
    x = hidden.view(len(routing.tokens), *routing.shape) if by_expert else hidden
    out = torch.zeros_like(x)
    for e, tokens in enumerate(routing.tokens):
        if not len(tokens):
            continue
        y = _product(module, record, _names(module)[0], e, x[e, tokens] if by_expert else x[tokens])
        y = _activated(module, y)
        y = _product(module, record, "down_proj", e, y)
        if getattr(module, "has_post_expert_norm", False):
            y = module.post_expert_norm(y)
        if routing.choices is None:
            place = torch.full_like(tokens, e), tokens
            out = out.index_put(place, y.to(out.dtype))
        else:
            y = y * given[1][tokens, routing.choices[e], None]
            out = out.index_add(0, tokens, y.to(out.dtype))
    return out.view_as(hidden)


def _activated(module: Any, y: Tensor) -> Tensor:
    """What goes into the second product."""
    if hasattr(module, "_apply_gate") and module.has_gate:
        return module._apply_gate(y)
    if not _by_expert(module):
        return module.act_fn(y)
    gate, up = y.chunk(2, dim=-1)
    return up * module.act_fn(gate)


def _product(module: Any, record: Record, name: str, e: int, x: Tensor) -> Tensor:
    """W[e] x + b[e] of some rows, recorded."""
    held = parameters(module, name)
    if not held:
        raise ModelError(
            f"{type(module).__name__}.{name} is no parameter in a pass (by peft?): leave "
            "its experts out of `layers`"
        )
    W, *b = (p[e] for p in held)
    return record(name, e, x, nn.functional.linear(x, W.t() if transposed(module) else W, *b))


def routing_of(name: str, module: Any, given: tuple[Tensor, ...]) -> Routing:
    """What a module of experts is called with.

    Raises:
        ModelError: it is called otherwise than transformers' own implementations are.
    """
    if _by_expert(module) and len(given) == 1:
        return Routing.by_expert(given[0], module.num_experts)
    if len(given) == 3 and not getattr(module, "_is_expert_parallel", False):
        hidden, index, weights = given
        if hidden.ndim == index.ndim == 2 and index.shape == weights.shape:
            return Routing.chosen(hidden, index, module.num_experts)
    raise ModelError(
        f"{name} ({type(module).__name__}): experts called with {[list(x.shape) for x in given]}; "
        "expected [N,H], [N,K] and [N,K], all experts on one device. Leave them out of `layers`"
    )


def tokens_of(module: nn.Module, hidden: Tensor) -> Tensor:
    """[N,H], different where tokens are, of what a module of experts is given first."""
    if not _by_expert(module):
        return hidden
    experts: Any = module.num_experts
    return hidden.view(experts, -1, hidden.shape[-1]).sum(0)


@torch.no_grad()
def verify(name: str, module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
    """Refuse experts whose own code, one expert after the other, gives something else.

    Raises:
        ModelError: names the module.
    """
    written = type(module).forward
    own = getattr(written, "__wrapped__", written)(module, *given)
    kind = out.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else out.dtype
    # What differs is the rounding of two products and of what is between them.
    if not near(out, own, dtype):
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
