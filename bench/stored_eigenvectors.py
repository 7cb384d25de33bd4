"""What eigenvectors in bf16 cost: scores beside those of eigenvectors in fp32, on a trained model.

    python bench/stored_eigenvectors.py [--steps 1000] [--topics 0] [--folder demo]

The demo's GPT-2 and its corpus, made where `--folder` does not hold them: `fit` twice with
the same labels, the demo's queries at full rank and at rank 32, every sequence scored.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from scipy.stats import spearmanr

from ekfac_fast import Factors, fit, prepare_queries, score
from ekfac_fast.cli import demo_small, inputs
from ekfac_fast.data import read, read_queries, tokenize
from ekfac_fast.stages.factors import EIGENVECTORS
from measure.environment import environment
from pages.markdown import table

RANKS = (None, 32)


def main(words: list[str]) -> None:
    arguments = parser().parse_args(words)
    with TemporaryDirectory() as place:
        folder = arguments.folder or Path(place) / "demo"
        demo_small.prepare(folder, arguments.steps, arguments.topics or None)
        rows = compared(folder, Path(place))
    print(table(["rank", "Spearman", "least of a query", "relative error"], rows))
    on = environment(torch.device("cpu"))
    print(f"{on['cpu']}, {on['threads']} thread(s), {on['date']}, torch {on['torch']}")


def compared(folder: Path, place: Path) -> list[list[str]]:
    """A line for each rank; prints what the files take."""
    source = inputs.load(str(folder / "model"), False)
    data = tokenize(read(folder / "corpus"), source.tokenizer, demo_small.CONTEXT)
    asked = read_queries(folder / "queries.jsonl", source.tokenizer, demo_small.CONTEXT)
    exact, rounded = (
        fit(source.model, data, out=place / f"{dtype}", eigenvectors=dtype)
        for dtype in (None, torch.bfloat16)
    )
    sizes = [stored(x) / 2**20 for x in (exact, rounded)]
    print(f"{len(data)} sequences; eigenvectors {sizes[0]:.1f} MiB, in bf16 {sizes[1]:.1f} MiB")
    rows = []
    for rank in RANKS:
        found = []
        for name, factors in (("exact", exact), ("rounded", rounded)):
            queries = prepare_queries(source.model, factors, asked, rank=rank)
            out = place / f"{name} {rank}"
            found.append(np.array(score(source.model, queries, data, out=out).matrix))
        rows.append([str(rank or "full"), *told(*found)])
    return rows


def told(exact: np.ndarray, rounded: np.ndarray) -> list[str]:
    """Of scores [Q,N]: Spearman, mean and least of the queries; the error in the Frobenius norm."""
    each = [spearmanr(a, b).statistic for a, b in zip(exact, rounded, strict=True)]
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    return [f"{np.mean(each):.6f}", f"{min(each):.6f}", f"{error:.1e}"]


def stored(factors: Factors) -> int:
    """Bytes of the eigenvectors' files."""
    return sum((factors.folder / name).stat().st_size for name in EIGENVECTORS.values())


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    made.add_argument("--steps", type=int, default=demo_small.STEPS)
    made.add_argument("--topics", type=int, default=0, help="so many; 0: all")
    made.add_argument("--folder", type=Path, help="of the demo; default: one that is deleted")
    return made


if __name__ == "__main__":
    main(sys.argv[1:])
