"""What several processes bring: a fit and a scan by one process on two threads, by two on one each.

    python bench/processes.py [--ways 1x2 2x1 1x1] [--turns 3] [--blocks 4] [--width 384]
        [--fitted 128] [--scanned 256]

PROCESSESxTHREADS, in turns; a GPT-2 of random weights. Seconds are those of `fit` and `score` from
the first process's call to its end, imports and model left out; medians. Scores of all ways are
held against each other before anything is printed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel

from ekfac_fast import Scores, fit, prepare_queries, score
from measure.environment import environment
from pages.markdown import table

TOKENS, QUERIES = 128, 8
# Of the model, and sequences of its stages.
SIZES = {"blocks": 4, "width": 384, "fitted": 128, "scanned": 256}
APART = 1e-3  # of two ways' scores, relative: fp32, and eigenvectors of near eigenvalues


def sequences(count: int, seed: int) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(seed)
    return [{"input_ids": rng.integers(0, 4096, TOKENS).tolist()} for _ in range(count)]


def job(out: Path, *, blocks: int, width: int, fitted: int, scanned: int) -> None:
    """In each process; the first notes its seconds."""
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=blocks, n_embd=width, n_head=width // 64, n_positions=TOKENS, vocab_size=4096
    )
    model = GPT2LMHeadModel(config).eval()
    start = time.perf_counter()
    factors = fit(model, sequences(fitted, 0), out=out / "fit")
    ended = time.perf_counter()
    # At full rank: of nearly equal singular values, rounding may choose another.
    queries = prepare_queries(model, factors, sequences(QUERIES, 1), rank=None, out=out / "queries")
    asked = time.perf_counter()
    score(model, queries, sequences(scanned, 2), out=out / "scores")
    seconds = {"fit": ended - start, "scan": time.perf_counter() - asked}
    if not dist.is_initialized() or dist.get_rank() == 0:
        (out / "seconds.json").write_text(json.dumps(seconds))


def timed(way: str, out: Path, asked: argparse.Namespace) -> dict[str, float]:
    """A run of so many processes on so many threads each."""
    processes, threads = map(int, way.split("x"))
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words = ["--job", str(out)]
    for name in SIZES:
        words += [f"--{name}", str(getattr(asked, name))]
    subprocess.run(
        [*start, __file__, *words], check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)}
    )
    return json.loads((out / "seconds.json").read_text())


def main(words: list[str]) -> None:
    asked = parser().parse_args(words)
    if asked.job:
        job(asked.job, **{name: getattr(asked, name) for name in SIZES})
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in asked.ways}
    with TemporaryDirectory() as name:
        first = None
        for turn in range(asked.turns):
            for way in asked.ways:
                out = Path(name) / f"{way}-{turn}"
                found[way].append(timed(way, out, asked))
                matrix = Scores(out / "scores").matrix
                first = matrix if first is None else first
                error = np.linalg.norm(matrix - first) / np.linalg.norm(first)
                assert error < APART, f"{way}: scores are {error:.1e} from {asked.ways[0]}'s"
    middle = {
        way: {stage: statistics.median(x[stage] for x in runs) for stage in ("fit", "scan")}
        for way, runs in found.items()
    }
    base = middle[asked.ways[0]]
    rows = [
        [way.replace("x", " x "), *(f"{x[s]:.1f} s, {base[s] / x[s]:.2f}x" for s in base)]
        for way, x in middle.items()
    ]
    print(table(["processes x threads", "fit", "scan"], rows))
    on = environment(torch.device("cpu"))
    print(f"{on['cpu']}, {on['date']}, torch {on['torch']}, {asked.turns} turns")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ways", nargs="+", default=["1x2", "2x1", "1x1"])
    parser.add_argument("--turns", type=int, default=3)
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
