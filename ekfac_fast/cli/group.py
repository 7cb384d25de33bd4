"""A command in several processes: `torchrun --nproc-per-node 4 -m ekfac_fast fit ...`.

All run the same command line; the first speaks and shows progress. With `--shard` the weights of
the model lie in all of them.
"""

import os
import time
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, Error, ProcessError
from .terminal import Terminal

if TYPE_CHECKING:
    from torch import nn

# Seconds that torchrun has to end a process whose error the first has told already.
HEARD = 10.0


def shared(console: Terminal) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose processes share its work where torchrun has started several."""

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(*args: Any, **kwargs: Any) -> None:
            import torch.distributed as dist

            if not dist.is_torchelastic_launched():
                return command(*args, **kwargs)
            rank = _join()
            console.quiet = rank > 0
            try:
                command(*args, **kwargs)
            except ProcessError:
                raise
            except Error as error:
                if rank > 0:
                    time.sleep(HEARD)
                    console.quiet = False
                    raise type(error)(f"process {rank}: {error}") from error
                raise
            dist.destroy_process_group()

        return run

    return decorated


def _join() -> int:
    """This process in its group, on a GPU of its own where there are any; its number."""
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return dist.get_rank()
    local, here = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= here:
        raise ArgumentError(
            f"process {local} of this machine has no GPU: there are {here}. Give torchrun "
            f"--nproc-per-node {here}"
        )
    torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", local))
    return dist.get_rank()


def check_device_map(shard: bool) -> None:
    """ArgumentError where a device map, which is one process's, meets several."""
    import torch.distributed as dist

    if shard or dist.is_torchelastic_launched():
        raise ArgumentError(
            "--device-map spreads a model over the devices of one process: leave --shard out, and "
            "start without torchrun"
        )


def sharded(model: "nn.Module") -> "nn.Module":
    """A model whose weights lie in all processes (FSDP2, block by block); frozen.

    Raises:
        ArgumentError: there is one process, or the model does not say what its blocks are.
    """
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        raise ArgumentError("--shard: start several processes with torchrun")
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise ArgumentError(
            f"--shard: a {type(model).__name__} does not say what its blocks are "
            "(_no_split_modules); shard it yourself and use the API"
        )
    model.requires_grad_(False)
    for block in blocks:
        fully_shard(block)
    fully_shard(model)
    return model
