"""kronfluence beside itself with the backend: the same work, interleaved in one process.

    python bench/against_kronfluence.py [--cases small-gpt gpt2-mlp mlp] [--stages self pairwise]
        [--repeats 5] [--threads 2] [--out bench/results/against_kronfluence.jsonl] [--smoke]

Every stage runs `repeats` times on each side (A B, B A, A B, ...), as a whole call of
kronfluence's Analyzer: loading, forward and backward passes, files. Both sides fit eigenvalues and
compute scores from the plain side's files, so that results are compared on equal input; only then
is a ratio of medians printed. Peak memory is what a call takes above what was there before it.
"""

# ruff: noqa: D102 (methods of Side are the stages of their names)

import argparse
import contextlib
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from kronfluence import Analyzer, prepare_model
from torch import Tensor

import ekfac_fast.kronfluence as fast
from ekfac_fast import ops
from measure.environment import device, environment
from measure.rows import OURS, Row, append
from measure.timing import extra_bytes
from ways.kronfluence_cases import Case, cases

DEVICE = device(None)
CPU_CASES = ("small-gpt", "gpt2-mlp", "mlp")
GPU_CASES = ("gpu-gpt2", "gpu-llama")
# The way that is not ours.
PLAIN = "kronfluence"
# The stages whose results others start from.
FACTORS = ("covariance", "eigendecomposition", "eigenvalue correction")


@dataclass
class Measure:
    """One stage on one side: seconds of every run, the largest peak, the last result."""

    seconds: list[float]
    peak_bytes: int
    result: dict[str, Tensor]


@contextlib.contextmanager
def watched(measure: Measure) -> Iterator[None]:
    """Time and peak memory of the block, added to `measure`."""
    with extra_bytes(DEVICE) as taken:
        start = time.perf_counter()
        yield
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        measure.seconds.append(time.perf_counter() - start)
    measure.peak_bytes = max(measure.peak_bytes, taken())


class Side:
    """One model, with or without the backend, in the folder that both sides share."""

    def __init__(self, case: Case, backend: bool, folder: str) -> None:
        self.case, self.backend = case, backend
        self.name = "backend" if backend else "plain"
        torch.manual_seed(0)
        with self.on():
            self.model = prepare_model(case.model(), case.task)
            self.analyzer = Analyzer(
                "bench", self.model, case.task, disable_tqdm=True, output_dir=folder
            )
        self.analyzer.logger.setLevel(logging.ERROR)

    @contextlib.contextmanager
    def on(self, **options: str) -> Iterator[None]:
        """The backend for a block, on the side that has it."""
        with fast.enabled(**options) if self.backend else contextlib.nullcontext():
            yield

    def covariance(self) -> dict[str, Tensor]:
        self.analyzer.fit_covariance_matrices(
            self.name,
            self.case.train,
            per_device_batch_size=self.case.train_batch,
            factor_args=self.case.factor_args,
            overwrite_output_dir=True,
        )
        return self.analyzer.load_covariance_matrices(self.name)["gradient_covariance"]

    def eigendecomposition(self) -> dict[str, Tensor]:
        self.analyzer.perform_eigendecomposition(
            self.name, factor_args=self.case.factor_args, overwrite_output_dir=True
        )
        return self.analyzer.load_eigendecomposition(self.name)["gradient_eigenvalues"]

    def eigenvalues(self) -> dict[str, Tensor]:
        name = f"{self.name}_eigenvalues"
        self.analyzer.fit_lambda_matrices(
            name,
            self.case.train,
            per_device_batch_size=self.case.train_batch,
            factor_args=self.case.factor_args,
            load_from_factors_name="plain",
            overwrite_output_dir=True,
        )
        return self.analyzer.load_lambda_matrices(name)["lambda_matrix"]

    def pairwise(self, **choices) -> dict[str, Tensor]:
        self.analyzer.compute_pairwise_scores(
            self.name,
            "plain_eigenvalues",
            self.case.query,
            self.case.train,
            per_device_query_batch_size=self.case.query_batch,
            per_device_train_batch_size=self.case.train_batch,
            score_args=replace(self.case.score_args, damping_factor=None, **choices),
            overwrite_output_dir=True,
        )
        return self.analyzer.load_pairwise_scores(self.name)

    def self_scores(self, **choices) -> dict[str, Tensor]:
        self.analyzer.compute_self_scores(
            self.name,
            "plain_eigenvalues",
            self.case.train,
            per_device_train_batch_size=self.case.train_batch,
            score_args=replace(self.case.score_args, damping_factor=None, **choices),
            overwrite_output_dir=True,
        )
        return self.analyzer.load_self_scores(self.name)


@dataclass(frozen=True)
class Stage:
    """What both sides do; the backend's options, if any; whether it is part of the pipeline."""

    name: str
    run: Callable[[Side], dict[str, Tensor]]
    options: tuple[tuple[str, str], ...] = ()
    pipeline: bool = False


def stages(case: Case) -> list[Stage]:
    low = {"query_gradient_low_rank": case.rank}
    exact = {**low, "use_full_svd": True}
    label = f"pairwise, rank {case.rank}"
    listed = [
        Stage("covariance", Side.covariance, pipeline=True),
        Stage("eigendecomposition", Side.eigendecomposition),
        Stage("eigenvalue correction", Side.eigenvalues, pipeline=True),
        Stage("self scores", lambda side: side.self_scores()),
        Stage(
            "self scores, measurement",
            lambda side: side.self_scores(use_measurement_for_self_influence=True),
        ),
        Stage("pairwise, full rank", lambda side: side.pairwise()),
        Stage(f"{label}, svd_lowrank", lambda side: side.pairwise(**low), pipeline=True),
        Stage(f"{label}, full SVD", lambda side: side.pairwise(**exact)),
        Stage(
            f"{label}, full SVD, randomised",
            lambda side: side.pairwise(**exact),
            (("truncation", "randomised"),),
        ),
        Stage(
            "pairwise, aggregated queries",
            lambda side: side.pairwise(aggregate_query_gradients=True),
        ),
    ]
    if case.per_token:
        listed.append(
            Stage("pairwise, per token", lambda side: side.pairwise(compute_per_token_scores=True))
        )
    return listed


def run_stage(stage: Stage, sides: list[Side], repeats: int, start: int) -> list[Measure]:
    """Both sides, interleaved; who goes first alternates. Draws are the same on both."""
    measures = [Measure([], 0, {}) for _ in sides]
    for repeat in range(repeats):
        order = range(len(sides)) if (start + repeat) % 2 == 0 else reversed(range(len(sides)))
        for index in order:
            torch.manual_seed(1)
            with sides[index].on(**dict(stage.options)), watched(measures[index]):
                measures[index].result = stage.run(sides[index])
    return measures


def agreement(plain: dict[str, Tensor], ours: dict[str, Tensor]) -> tuple[float, float | None]:
    """Relative error in the Frobenius norm, of all numbers together; of scores, Spearman's rho."""
    x, y = (torch.cat([t.double().flatten() for t in result.values()]) for result in (plain, ours))
    error, rho = float((x - y).norm() / x.norm()), None
    if plain.keys() == {"all_modules"}:
        ranks = torch.stack([t.argsort().argsort().double() for t in (x, y)])
        rho = float(torch.corrcoef(ranks)[0, 1])
    return error, rho


def facts() -> dict:
    """Where and with what the numbers were taken."""
    tiers = {op: [t for t, here in own.items() if here] for op, own in ops.coverage().items()}
    return {"kronfluence": version("kronfluence"), "ops": tiers} | environment(DEVICE)


def run_case(case: Case, wanted: list[str], repeats: int, here: dict) -> list[Row]:
    """The rows of one case; the sum of the pipeline's stages is the last.

    With `wanted`, only stages whose names contain one of its words are measured; the factors that
    they start from are fitted once, on the plain side.
    """
    rows: list[Row] = []
    arguments = {key: str(value) for key, value in asdict(case.score_args).items()}
    common = Row(
        bench="against_kronfluence",
        name=case.name,
        quantity="pipeline without eigendecomposition",
        shape={
            "train": len(case.train),
            "queries": len(case.query),
            "train_batch": case.train_batch,
            "query_batch": case.query_batch,
        },
        details={"score_args": arguments, "repeats": repeats},
        environment=here,
    )
    with tempfile.TemporaryDirectory() as folder:
        sides = [Side(case, backend, folder) for backend in (False, True)]
        for number, stage in enumerate(stages(case)):
            if wanted and not any(word in stage.name for word in wanted):
                if stage.name in FACTORS:
                    stage.run(sides[0])
                continue
            plain, ours = run_stage(stage, sides, repeats, number)
            measures = {PLAIN: plain, OURS: ours}
            error, rho = agreement(plain.result, ours.result)
            more = {"load": os.getloadavg()[0]} | ({} if rho is None else {"spearman": rho})
            row = replace(
                common,
                quantity=stage.name,
                seconds={way: statistics.median(x.seconds) for way, x in measures.items()},
                samples={way: x.seconds for way, x in measures.items()},
                extra_bytes={way: x.peak_bytes for way, x in measures.items()},
                error=error,
                details=common.details | more,
            )
            rows.append(row)
            print(line(row), flush=True)
    steps = [row for row in rows if row.quantity in {s.name for s in stages(case) if s.pipeline}]
    if not wanted:
        total = replace(
            common,
            seconds={way: sum(row.seconds[way] for row in steps) for way in (PLAIN, OURS)},
            extra_bytes={way: max(row.extra_bytes[way] for row in steps) for way in (PLAIN, OURS)},
        )
        rows.append(total)
        print(line(total), flush=True)
    return rows


HEADER = (
    f"{'case':<14}{'stage':<38}{'plain s':>9}{'backend s':>11}{'ratio':>7}"
    f"{'plain MiB':>11}{'backend MiB':>13}{'rel. error':>12}{'Spearman':>10}"
)


def line(row: Row) -> str:
    """One line of the table."""
    plain, ours = (row.extra_bytes[way] / 2**20 for way in (PLAIN, OURS))
    text = (
        f"{row.name:<14}{row.quantity:<38}{row.seconds[PLAIN]:>9.3f}{row.ours:>11.3f}"
        f"{row.times(PLAIN):>7.2f}{plain:>11.0f}{ours:>13.0f}"
    )
    text += "" if row.error is None else f"{row.error:>12.1e}"
    rho = row.details.get("spearman")
    return text + ("" if rho is None else f"{rho:>10.6f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--cases", nargs="+", help="default: for this machine")
    parser.add_argument(
        "--stages", nargs="+", default=[], help="words in their names; default: all"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run at all")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*torch.cuda.amp.GradScaler.*")
    torch.set_num_threads(options.threads)
    available = cases(options.smoke)
    chosen = options.cases or (GPU_CASES if DEVICE.type == "cuda" else CPU_CASES)
    unknown = set(chosen) - set(available)
    if unknown:
        sys.exit(f"unknown cases {sorted(unknown)}; there are {', '.join(available)}")
    here = facts()
    print(HEADER)
    for name in chosen:
        rows = run_case(available[name](), options.stages, options.repeats, here)
        if options.out:
            append(options.out, rows)
    print(fast.report())


if __name__ == "__main__":
    main()
