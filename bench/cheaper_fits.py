"""What a cheaper fit costs: its scores beside those of the whole one, on a trained model.

    python bench/cheaper_fits.py [--steps 1000] [--topics 0] [--folder demo]

The demo's GPT-2 and its corpus, made where `--folder` does not hold them; the demo's queries at
full rank and at rank 32, every sequence scored. The same labels in all but "other labels", which
says how much chance there is in a fit.
"""

import argparse
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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
HEADS = "fit, core seconds, eigenvectors MiB, rank, Spearman, least of a query, relative error"


def fits(sequences: int) -> dict[str, dict[str, Any]]:
    """Arguments of every fit, the whole one first."""
    found: dict[str, dict[str, Any]] = {"whole": {}, "other labels": {"seed": 1}}
    found["eigenvectors in bf16"] = {"eigenvectors": torch.bfloat16}
    for part in (2, 4, 8):
        found[f"eigenvalues of 1/{part}"] = {"eigenvalue_examples": max(1, sequences // part)}
    return found


def main(words: list[str]) -> None:
    arguments = parser().parse_args(words)
    with TemporaryDirectory() as place:
        folder = arguments.folder or Path(place) / "demo"
        demo_small.prepare(folder, arguments.steps, arguments.topics or None)
        rows = compared(folder, Path(place))
    print(table(HEADS.split(", "), rows))
    on = environment(torch.device("cpu"))
    print(f"{on['cpu']}, {on['threads']} thread(s), {on['date']}, torch {on['torch']}")


def compared(folder: Path, place: Path) -> list[list[str]]:
    """A line for each fit and rank."""
    source = inputs.load(str(folder / "model"), False)
    data = tokenize(read(folder / "corpus"), source.tokenizer, demo_small.CONTEXT)
    asked = read_queries(folder / "queries.jsonl", source.tokenizer, demo_small.CONTEXT)
    print(f"{len(data)} sequences, {len(asked)} queries")
    exact, rows = {}, []
    for name, how in fits(len(data)).items():
        start = time.process_time()
        factors = fit(source.model, data, out=place / name.replace("/", " in "), **how)
        took, size = time.process_time() - start, stored(factors) / 2**20
        for rank in RANKS:
            queries = prepare_queries(source.model, factors, asked, rank=rank)
            out = factors.folder / f"scores {rank}"
            found = np.array(score(source.model, queries, data, out=out).matrix)
            beside = told(exact.setdefault(rank, found), found)
            rows.append([name, f"{took:.0f}", f"{size:.1f}", str(rank or "full"), *beside])
    return rows


def told(exact: np.ndarray, other: np.ndarray) -> list[str]:
    """Of scores [Q,N]: Spearman, mean and least of the queries; the error in the Frobenius norm."""
    each = [spearmanr(a, b).statistic for a, b in zip(exact, other, strict=True)]
    error = np.linalg.norm(other - exact) / np.linalg.norm(exact)
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
