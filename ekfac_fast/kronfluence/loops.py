"""kronfluence's own loops, called with what they spend for nothing taken out."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from kronfluence.arguments import ScoreArguments
from kronfluence.module.linear import TrackedLinear
from kronfluence.module.tracked_module import TrackedModule
from kronfluence.utils.state import State
from torch import Tensor, nn
from torch.utils import data
from torch.utils._pytree import tree_leaves

from . import switch
from .capture import wide
from .eigendecomposition import check_sizes
from .memory import free_bytes
from .modules import Backed, FastLinear, adopt

Scores = dict[str, Tensor]


def adopting(update_factor_args: Callable[..., None]) -> Callable[..., None]:
    """The first call of every stage: modules prepared without the backend join it."""

    @functools.wraps(update_factor_args)
    def wrapper(model: nn.Module, factor_args: Any) -> None:
        adopt(model)
        update_factor_args(model=model, factor_args=factor_args)

    return wrapper


def set_factors(
    model: nn.Module, factor_name: str, factors: dict[str, Tensor], clone: bool = False
) -> None:
    """kronfluence's function of this name, checked, and without the copy where nothing needs it.

    kronfluence's own path changes factors in place, so it gets its copies; ours never does.
    """
    check_sizes({factor_name: factors}, model)
    for module in model.modules():
        if isinstance(module, TrackedModule):
            factor = factors[module.name]
            reads_only = (
                isinstance(module, FastLinear)
                and module.options is not None
                and module.obstacle(module.current_mode) is None
            )
            module.set_factor(factor_name, factor.clone() if clone and not reads_only else factor)


def in_score_dtype(compute: Callable[..., Scores]) -> Callable[..., Scores]:
    """Sum scores over modules in fp32 or fp64 (our trackers do not round), round them once here."""

    @functools.wraps(compute)
    def wrapper(*args: Any, score_args: ScoreArguments, **kwargs: Any) -> Scores:
        scores = compute(*args, score_args=score_args, **kwargs)
        return {name: s.to(score_args.score_dtype) for name, s in scores.items()}

    return wrapper


class SameDraws:
    """A query loader after which a pass over `train` is left out every `steps` batches.

    Creating the iterator of a pass draws one seed from the global generator. It is drawn here as
    well, so that `svd_lowrank` gets the same random columns with fewer passes.
    """

    def __init__(self, queries: data.DataLoader, train: data.DataLoader, steps: int, held: int):
        self.queries, self.train, self.steps, self.held = queries, train, steps, held
        self.dataset = queries.dataset

    def __len__(self) -> int:
        return len(self.queries)

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self.queries):
            yield batch
            ended = number + 1
            if ended < len(self) and ended % self.steps == 0 and ended % self.held:
                torch.empty((), dtype=torch.int64).random_(generator=self.train.generator)


def holding_queries(compute: Callable[..., Scores]) -> Callable[..., Scores]:
    """Pairwise scores with more query batches per pass over the training data, same scores.

    Not with `aggregate_train_gradients`: there kronfluence makes a single pass already.
    """

    @functools.wraps(compute)
    def wrapper(
        *args: Any,
        model: nn.Module,
        state: State,
        score_args: ScoreArguments,
        query_loader: data.DataLoader,
        per_device_query_batch_size: int,
        tracked_module_names: list[str] | None,
        train_loader: data.DataLoader,
        **kwargs: Any,
    ) -> Scores:
        options, steps = switch.current(), score_args.query_gradient_accumulation_steps
        loader, asked = query_loader, score_args
        if options is not None and options.hold_queries and not asked.aggregate_train_gradients:
            batch = per_device_query_batch_size * state.num_processes
            needed = batch * query_bytes(model, asked, tracked_module_names, train_loader)
            room = options.memory_share * _common_free_bytes(state)
            held = steps * max(1, int(room // (steps * max(needed, 1))))
            loader = SameDraws(query_loader, train_loader, steps, held)
            asked = dataclasses.replace(asked, query_gradient_accumulation_steps=held)
        return compute(
            *args,
            model=model,
            state=state,
            score_args=asked,
            query_loader=loader,
            per_device_query_batch_size=per_device_query_batch_size,
            tracked_module_names=tracked_module_names,
            train_loader=train_loader,
            **kwargs,
        )

    return wrapper


def query_bytes(
    model: nn.Module, args: ScoreArguments, names: list[str] | None, loader: data.DataLoader
) -> int:
    """Bytes that one held query takes in all tracked modules: its factors, a batch of its scores.

    Tokens per example are bounded from above by the numbers in the first one.
    """
    total, scores = 0, loader.batch_size or 1
    if args.compute_per_token_scores:
        example = tree_leaves(loader.dataset[0])
        scores *= sum(x.numel() if isinstance(x, Tensor) else 1 for x in example)
    for module in model.modules():
        if not isinstance(module, TrackedModule) or (names and module.name not in names):
            continue
        if isinstance(module, TrackedLinear):
            O = module.out_features
            J = module.in_features + (module.original_module.bias is not None)
        else:
            weight = module.original_module.weight
            O, J = weight.shape[0], weight.numel() // max(weight.shape[0], 1) + 1
        rank = args.query_gradient_low_rank
        dense = rank is None or min(O, J) <= rank
        total += (O * J if dense else rank * (O + J)) * args.score_dtype.itemsize
        total += scores * wide(args.score_dtype).itemsize
    return total


def _common_free_bytes(state: State) -> int:
    """Free memory, the least of all processes: they must agree on the number of passes."""
    free = free_bytes(state.device)
    if state.use_distributed:
        least = torch.tensor(free, device=state.device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        free = int(least)
    return free


def measuring(compute: Callable[..., Scores]) -> Callable[..., Scores]:
    """Self-influence with a measurement: tell the modules, whose queries then stay rotated."""

    @functools.wraps(compute)
    def wrapper(*args: Any, model: nn.Module, **kwargs: Any) -> Scores:
        adopt(model)
        backed = [module for module in model.modules() if isinstance(module, Backed)]
        for module in backed:
            module.scores_measurement = True
        try:
            return compute(*args, model=model, **kwargs)
        finally:
            for module in backed:
                module.scores_measurement = False

    return wrapper
