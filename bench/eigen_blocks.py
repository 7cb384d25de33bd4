"""What diagonal blocks save of the eigendecompositions: GPT-2's MLP matrices whole, and cut.

    python bench/eigen_blocks.py [--layers 12] [--blocks 1 2 4] [--width 768] [--turns 1]

Random covariances of the sides of so many layers, decomposed as `fit` does, one block after the
other in turns. Before it is timed, what each cut finds is held against its blocks.
"""

import argparse
import sys
import time

import torch
from torch import Tensor

from ekfac_fast.curvature.eigen import Job, eigendecompositions, largest_first, united
from measure.environment import environment
from pages.markdown import duration, table

ERROR = 1e-4  # as `fit` allows fp32


def main(words: list[str]) -> None:
    arguments = parser().parse_args(words)
    torch.manual_seed(0)
    width = arguments.width
    sides = [width + 1, 4 * width, 4 * width + 1, width] * arguments.layers
    sums = {n: covariance(n) for n in set(sides)}
    jobs = {
        blocks: [x for n in sides for x in Job(sums[n], torch.tensor(1), f"{n}").in_blocks(blocks)]
        for blocks in arguments.blocks
    }
    for blocks in arguments.blocks:
        check(sums[width + 1], blocks)
    times: dict[int, list[float]] = {blocks: [] for blocks in jobs}
    for _ in range(arguments.turns):
        for blocks, every in jobs.items():
            start = time.perf_counter()
            solve(every)
            times[blocks].append(time.perf_counter() - start)
    least = {blocks: min(found) for blocks, found in times.items()}
    first = least[arguments.blocks[0]]
    lines = [[str(n), duration(x), f"{first / x:.1f}"] for n, x in least.items()]
    print(table(["blocks", f"{len(sides)} matrices", "times faster"], lines))
    on = environment(torch.device("cpu"))
    print(f"{on['cpu']}, {on['threads']} thread(s), {on['date']}, torch {on['torch']}")


def covariance(n: int) -> Tensor:
    """Of correlated rows, as many as columns and a half."""
    x = torch.randn(n + n // 2, n) * torch.logspace(0, -2, n)
    return x.T @ x / len(x)


def solve(jobs: list[Job]) -> list[tuple[Tensor, Tensor]]:
    """As `fit`."""
    return list(
        eigendecompositions([jobs[i] for i in largest_first(jobs)], torch.device("cpu"), None)
    )


def check(cov: Tensor, blocks: int) -> None:
    """What is found diagonalises the blocks, and nothing but them."""
    solved = eigendecompositions(
        Job(cov, torch.tensor(1), "checked").in_blocks(blocks), torch.device("cpu"), None
    )
    (found,) = united(({"values": x, "vectors": Q} for x, Q in solved), blocks)
    cut = torch.arange(len(cov)).tensor_split(blocks)
    expected = torch.block_diag(*(cov[p][:, p] for p in cut))
    made = (found["vectors"] * found["values"]) @ found["vectors"].T
    error = (made - expected).norm() / expected.norm()
    assert error < ERROR, f"{blocks} blocks: {error:.1e}"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    made.add_argument("--layers", type=int, default=12)
    made.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 4])
    made.add_argument("--width", type=int, default=768)
    made.add_argument("--turns", type=int, default=1)
    return made


if __name__ == "__main__":
    main(sys.argv[1:])
