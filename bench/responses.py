"""What does each approximation of EK-FAC cost? Correlation with the proximal Bregman response.

    python bench/responses.py                         # docs/responses.md and .svg
    python bench/responses.py --cases wine --queries 4 --examples 8 --out /tmp/responses

Each step leaves out more: the damped Gauss-Newton solve (conjugate gradients to convergence, all
layers together), the same layer by layer, EK-FAC of several draws of labels, of one, K-FAC; a low
rank, and bf16. Beside them the Fisher's diagonal, no curvature at all, and LiSSA. Models are small
enough to optimise the response itself, in fp64.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from ekfac_fast import Factors, fit, prepare_queries, score
from ekfac_fast.curvature.solvers import Outcome
from ekfac_fast.validation import baselines
from ekfac_fast.validation.ablations import diagonal_factors, kfac_factors
from ekfac_fast.validation.pbrf import responses
from measure.environment import environment
from pages.responses_page import figure, page
from ways.tabular import SETS, Case, tabular

ROOT = Path(__file__).parents[1]
# Enough for what counts as an exact solve, by its relative residual.
EXACT, RESIDUAL = "cg:1000", 1e-3
# Of the response: small enough to be a derivative, in shares of an example.
WEIGHT = 0.01
RANK, DRAWS, LISSA = 2, 16, 5000
Method = Callable[[], np.ndarray]


def settings(case: Case) -> dict:
    """Of every pass: a table is one batch."""
    return {"task": case.task, "batch_size": len(case.data)}


class Estimators:
    """Scores of a case by every method, under one damping: a tenth of the mean eigenvalue."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.stopped = 0  # queries of the last refinement that failed
        self.settings = settings(case)
        self.factors = self.fitted("EK-FAC", case)
        lam = [own.lam for own in self.factors.values()]
        self.damping = 0.1 * sum(float(x.sum()) for x in lam) / sum(x.numel() for x in lam)

    def every(self) -> Iterator[tuple[str, Method]]:
        """(name, scores), from the exact solve down, then what is beside that way."""
        yield "exact solve", partial(self.solved, self.factors)
        yield "layer by layer", self.layer_by_layer
        yield f"EK-FAC, {DRAWS} draws", lambda: self.scored(self.fitted("draws", self.drawn()))
        yield "EK-FAC", partial(self.scored, self.factors)
        yield "K-FAC", lambda: self.scored(kfac_factors(self.factors, self.folder / "K-FAC"))
        yield f"EK-FAC, rank {RANK}", partial(self.scored, self.factors, rank=RANK)
        yield f"EK-FAC, rank {RANK}, bf16", self.in_bf16
        yield "diagonal", self.diagonal
        yield "dot product", self.dot
        refine = f"lissa:{LISSA}"
        yield f"LiSSA, {LISSA} steps", partial(self.scored, self.factors, refine=refine)

    def fitted(self, name: str, case: Case, layers: list[str] | None = None, **more) -> Factors:
        """EK-FAC's, with the same labels each time."""
        torch.manual_seed(0)
        place = self.folder / name
        return fit(
            case.model, case.data, out=place, layers=layers or ["all"], **self.settings, **more
        )

    def scored(self, factors: Factors, case=None, rank=None, refine=None, **more) -> np.ndarray:
        """[Q,N]"""
        case = case or self.case
        model, data = case.model, case.data
        if refine is not None:
            more |= {"refine": refine, "dataset": data, "refine_examples": len(data)}
        queries = prepare_queries(
            model, factors, case.queries, rank=rank, damping=self.damping, **self.settings, **more
        )
        if queries.refinement is not None:
            self.stopped = int((queries.refinement.outcomes > Outcome.CONVERGED).sum())
        if refine == EXACT and queries.residual.max() > RESIDUAL:
            raise SystemExit(f"{case.name}: a residual of {queries.residual.max():.1e} is left")
        with TemporaryDirectory() as place:
            return np.array(
                score(model, queries, data, out=Path(place) / "s", **self.settings).matrix
            )

    def solved(self, factors: Factors) -> np.ndarray:
        """The damped Gauss-Newton solve in the layers of some factors."""
        return self.scored(factors, refine=EXACT)

    def drawn(self) -> Case:
        """Every example several times: each time with labels of its own."""
        return replace(self.case, data=self.case.data * DRAWS)

    def layer_by_layer(self) -> np.ndarray:
        """The sum of solves that know one layer each."""
        total = 0
        for number, name in enumerate(self.factors):
            factors = self.fitted(f"layer {number}", self.case, [name])
            total = total + self.solved(factors)
        return total

    def in_bf16(self) -> np.ndarray:
        """Passes in bf16, of weights in fp32."""
        single, lowered = self.case.single(), {"autocast": torch.bfloat16}
        factors = self.fitted("bf16", single, **lowered)
        return self.scored(factors, single, rank=RANK, **lowered)

    def diagonal(self) -> np.ndarray:
        """The Fisher's."""
        torch.manual_seed(0)
        case, place = self.case, self.folder / "diagonal"
        return self.scored(
            diagonal_factors(
                case.model, case.data, out=place, layers=list(self.factors), **self.settings
            )
        )

    def dot(self) -> np.ndarray:
        """Of gradients."""
        case = self.case
        return baselines.gradient_dot(
            case.model, case.queries, case.data, layers=list(self.factors), **self.settings
        )


def compared(case: Case, examples: int, folder: Path) -> dict:
    """Correlations and processor seconds of every method on a case."""
    torch.manual_seed(0)
    ways = Estimators(case, folder)
    some = np.random.default_rng(0).permutation(len(case.data))[:examples].tolist()
    start = time.process_time()
    found = responses(
        case.model, case.queries, case.data, some, damping=ways.damping,
        layers=list(ways.factors), weight=WEIGHT / len(case.data), **settings(case),
    )  # fmt: skip
    told = {"case": case.name, "responses": time.process_time() - start, "damping": ways.damping}
    told |= {"examples": len(case.data), "queries": len(case.queries), "asked": len(some)}
    told["parameters"] = sum(own.lam.numel() for own in ways.factors.values())
    rows = []
    for name, method in ways.every():
        start, ways.stopped = time.process_time(), 0
        scores = method()
        seconds = time.process_time() - start
        each = [np.corrcoef(a, b)[0, 1] for a, b in zip(scores[:, some], found, strict=True)]
        error = np.std(each, ddof=1) / len(each) ** 0.5
        row = {"name": name, "mean": np.mean(each), "error": error, "seconds": seconds}
        rows.append(row | {"stopped": ways.stopped})
        print(
            f"{case.name}, {name}: {np.mean(each):.4f} +- {error:.4f}, {seconds:.1f} s", flush=True
        )
    return told | {"rows": rows}


def main(words: list[str]) -> None:
    arguments = parser().parse_args(words)
    torch.set_num_threads(1)
    with TemporaryDirectory() as place:
        folder, found = Path(place), []
        for name in arguments.cases:
            case = tabular(name, arguments.queries)
            found.append(compared(case, arguments.examples, folder / name))
    on = environment(torch.device("cpu"))
    command = shlex.join(["python", "bench/responses.py", *words])
    facts = {"machine": on["cpu"], "date": on["date"], "revision": on["revision"]}
    out = arguments.out
    figure(found, out.with_suffix(".svg"))
    out.with_suffix(".md").write_text(page(found, facts | {"command": command}, out.name))
    print(out.with_suffix(".md"))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    made.add_argument("--cases", nargs="+", choices=SETS, default=SETS)
    made.add_argument("--queries", type=int, default=16)
    made.add_argument("--examples", type=int, default=32, help="whose responses are optimised")
    made.add_argument("--out", type=Path, default=ROOT / "docs" / "responses", help="no suffix")
    return made


if __name__ == "__main__":
    main(sys.argv[1:])
