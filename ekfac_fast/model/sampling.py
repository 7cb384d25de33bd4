"""Labels drawn from a model's own distribution (true Fisher, Eq. 11), the same for any batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

# Draws this close to a step of the cumulative distribution may fall either way under other
# rounding.
EDGE = 1e-6
# Probabilities that are summed in their own dtype; sums of these are fp64.
BLOCK = 256


def uniforms(
    seed: int, ids: Tensor, mask: Tensor, draws: Sequence[int], *, last: bool = False
) -> Tensor:
    """One uniform number a draw and position, fp64 [N,B,T], for the label of the position after it.

    Philox, keyed by (seed, example id) and counted from `draw`, one number a real position: batch
    size, order and padding change nothing.

    Args:
        ids: of the examples, [B].
        mask: real positions [B,T].
        draws: which draws of an example's labels.
        last: the last real position has a label, too: its own.
    """
    # In one copy: the host waits for the device once.
    told = torch.cat([ids.unsqueeze(1), (mask != 0).to(ids.dtype)], 1).cpu().numpy()
    found = np.zeros((len(draws), *mask.shape))
    for row, example in enumerate(told[:, 0].tolist()):
        # Where the label of t is the token after it, the last real position has none.
        real = np.flatnonzero(told[row, 1:])[: None if last else -1]
        for own, draw in zip(found, draws, strict=True):
            philox = np.random.Philox(key=[seed, example % 2**64], counter=[0, 0, 0, draw])
            own[row, real] = np.random.Generator(philox).random(len(real))
    return torch.from_numpy(found)


@contextmanager
def seeded(device: torch.device, *key: int) -> Iterator[None]:
    """Torch's own random numbers are those of a key, on the CPU and, where `device` is one, on all
    GPUs; afterwards they go on as if nothing had been drawn.
    """
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    with torch.random.fork_rng(range(torch.cuda.device_count()) if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def inverted(p: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Labels [D,n] at which the cumulative distribution exceeds `uniform`, and how many are edges.

    Steps of whole blocks first, then within the block that is met: p is read once.

    Args:
        p: probabilities [n,V], fp32 or fp64; their sum may be a little off 1.
        uniform: fp64 [D,n].
    """
    V = p.shape[1]
    whole = V // BLOCK * BLOCK
    blocks = [p[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1)]
    if whole < V:
        blocks.append(p[:, whole:].sum(-1, keepdim=True))
    steps = torch.cat(blocks, 1).double().cumsum(1)  # [n,V/BLOCK]
    target = (uniform * steps[:, -1]).mT.contiguous()  # [n,D]
    block = _first_above(steps, target)
    before = torch.where(block > 0, steps.gather(1, (block - 1).clamp(min=0)), 0.0).unsqueeze(-1)
    label = block.unsqueeze(-1) * BLOCK + torch.arange(BLOCK, device=p.device)  # [n,D,BLOCK]
    inside = p.gather(1, label.clamp(max=V - 1).flatten(1)).view(label.shape).double()
    cdf = before + inside.masked_fill(label >= V, 0).cumsum(-1)
    place = _first_above(cdf, target.unsqueeze(-1))
    lower = torch.where(place > 0, cdf.gather(-1, (place - 1).clamp(min=0)), before)
    near = torch.cat([cdf.gather(-1, place), lower], -1) - target.unsqueeze(-1)
    edges = (near.abs() < EDGE).any(-1).sum()
    return label.gather(-1, place).squeeze(-1).mT.contiguous(), edges


def _first_above(cdf: Tensor, target: Tensor) -> Tensor:
    """Where a cumulative sum first exceeds a target; where rounding keeps it from that, its end."""
    end = (cdf < cdf[..., -1:]).sum(-1, keepdim=True)
    return torch.minimum(torch.searchsorted(cdf, target, right=True), end)
