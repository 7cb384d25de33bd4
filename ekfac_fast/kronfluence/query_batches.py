"""Query batches held together: fewer passes over the training data, the same scores.

kronfluence makes one pass for every `query_gradient_accumulation_steps` query batches. Its loop is
called here with more of them, as many as `memory_share` of the free memory holds; where that
proves too many after all, it is called again as the script asked.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils.memory import should_reduce_batch_size
from kronfluence.arguments import ScoreArguments
from kronfluence.module.linear import TrackedLinear
from kronfluence.module.tracked_module import TrackedModule
from kronfluence.utils.state import State, release_memory
from torch import Tensor, nn
from torch.utils import data
from torch.utils._pytree import tree_leaves

from ..curvature.memory import free_bytes
from ..ops.shapes import wide
from . import options as switched

Scores = dict[str, Tensor]


class SameDraws:
    """A query loader after which a pass over `train` is left out every `steps` batches.

    Creating the iterator of a pass draws one seed from the global generator. It is drawn here as
    well, so that `svd_lowrank` gets the same random columns with fewer passes.
    """

    def __init__(
        self, queries: data.DataLoader, train: data.DataLoader, steps: int, held: int
    ) -> None:
        self.queries, self.train, self.steps, self.held = queries, train, steps, held
        self.dataset = queries.dataset

    def __len__(self) -> int:
        return len(self.queries)

    def __iter__(self) -> Iterator[Any]:
        for ended, batch in enumerate(self.queries, start=1):
            yield batch
            if ended < len(self) and ended % self.steps == 0 and ended % self.held:
                torch.empty((), dtype=torch.int64).random_(generator=self.train.generator)


def holding_queries(compute: Callable[..., Scores]) -> Callable[..., Scores]:
    """kronfluence's `compute_pairwise_scores_with_loaders`, with fewer passes."""
    signature = inspect.signature(compute)

    @functools.wraps(compute)
    def wrapper(*args: Any, **kwargs: Any) -> Scores:
        asked = signature.bind(*args, **kwargs).arguments
        held = _with_more_queries(asked)
        if held is None:
            return compute(**asked)
        state: State = asked["state"]
        draws, cuda = torch.get_rng_state(), state.device.type == "cuda"
        device_draws = torch.cuda.get_rng_state(state.device) if cuda else None
        try:
            return compute(**held)
        except Exception as error:
            # Processes that run out of memory alone would leave the others waiting.
            if state.use_distributed or not should_reduce_batch_size(error):
                raise
        release_memory()
        torch.set_rng_state(draws)
        if device_draws is not None:
            torch.cuda.set_rng_state(device_draws, state.device)
        return compute(**asked)

    return wrapper


def _with_more_queries(asked: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of a call with fewer passes; None where there is nothing to gain.

    With `aggregate_train_gradients` kronfluence makes a single pass already.
    """
    options, args = switched.current(), asked["score_args"]
    steps, queries, train = (
        args.query_gradient_accumulation_steps,
        asked["query_loader"],
        asked["train_loader"],
    )
    if options is None or not options.hold_queries or args.aggregate_train_gradients:
        return None
    if len(queries) <= steps:
        return None
    batch = asked["per_device_query_batch_size"] * asked["state"].num_processes
    needed = batch * query_bytes(asked["model"], args, asked["tracked_module_names"], train)
    room = options.memory_share * _common_free_bytes(asked["state"])
    held = steps * int(room // max(steps * needed, 1))
    if held <= steps:
        return None
    return asked | {
        "query_loader": SameDraws(queries, train, steps, held),
        "score_args": dataclasses.replace(args, query_gradient_accumulation_steps=held),
    }


def query_bytes(
    model: nn.Module, args: ScoreArguments, names: list[str] | None, train: data.DataLoader
) -> int:
    """Bytes that one held query takes in all tracked modules: its factors, a batch of its scores.

    Tokens per example are bounded from above by the numbers in the first one.
    """
    total, scores = 0, train.batch_size or 1
    if args.compute_per_token_scores:
        example = tree_leaves(train.dataset[0])
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
