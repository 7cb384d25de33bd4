"""Ops against the machine's roofs and against the contractions of kronfluence.

    python bench/run.py [--op eigenvalues ...] [--shapes gpt2 ...] [--dtype float32 bfloat16]
        [--against kronfluence-order] [--threads 2] [--repeats 7] [--out bench/results/ops.jsonl]
    python bench/run.py --shapes acceptance

Each row is checked first (two-error rule against fp64, and against the other contraction on the
tensors that are timed); a wrong result ends the run. Then all candidates of the row and the GEMM
that gives the roof are timed in turn (A B C A B C), and medians are compared. Rows where we lose
are printed like the others.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import roofs
import torch
from shapes import ACCEPTANCE, MODELS, Case, layers
from work import agree, check, work

import ekfac_fast
from ekfac_fast import ops

QUANTITIES = (*map(ops.stem, ops.ALL), "queries")
# One sample of a short call is as many calls as take this long.
SAMPLE_SECONDS = 0.02
# A call that takes longer is not repeated as often: full SVDs take half a minute.
BUDGET_SECONDS = 60.0


@dataclass(frozen=True)
class Row:
    """One case in one dtype: median seconds by candidate, "ours" and "GEMM" always among them."""

    case: Case
    dtype: str
    checked: str
    seconds: dict[str, float]
    samples: dict[str, list[float]]
    flops: int
    bytes: int
    copy_rate: float

    @property
    def flop_rate(self) -> float:
        """FLOPs of the card a second."""
        return self.flops / self.seconds["ours"]

    def times(self, against: str) -> float:
        """Speed over another candidate; for "GEMM roof" the share of its rate."""
        if against == "GEMM roof":
            return self.flop_rate / (roofs.gemm_flops() / self.seconds["GEMM"])
        return self.seconds[against] / self.seconds["ours"]

    def __str__(self) -> str:
        """The printed line."""
        others = (f"{self.times(n):.2f}x {n}" for n in self.seconds if n not in ("ours", "GEMM"))
        rates = (
            f"{self.seconds['ours'] * 1e6:.0f} us",
            f"{self.flop_rate / 1e9:.0f} GFLOP/s",
            f"{self.bytes / self.seconds['ours'] / 1e9:.1f} GB/s",
            f"{self.times('GEMM roof'):.0%} of GEMM roof",
        )
        return " | ".join([f"{self.case.label} {self.dtype}", *rates, *others])

    def record(self, environment: dict) -> dict:
        """The JSON line."""
        return {
            "name": self.case.label,
            "quantity": self.case.quantity,
            "shape": asdict(self.case.shape) | {"per_token": self.case.per_token},
            "dtype": self.dtype,
            "checked": self.checked,
            "seconds": self.seconds,
            "samples": self.samples,
            "flops": self.flops,
            "bytes": self.bytes,
            "roofs": {
                "flops_per_second": roofs.gemm_flops() / self.seconds["GEMM"],
                "bytes_per_second": self.copy_rate,
            },
            "environment": environment,
        }


def measure(candidates: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds a call, `repeats` samples of each candidate, taken in turn; fewer of slow ones."""
    first = {name: roofs.seconds(call) for name, call in candidates.items()}
    calls = {name: max(1, int(SAMPLE_SECONDS / s)) for name, s in first.items()}
    rounds = {
        name: max(1, min(repeats, int(BUDGET_SECONDS / (first[name] * calls[name]))))
        for name in candidates
    }
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats):
        for name, call in candidates.items():
            if repeat < rounds[name]:
                n = calls[name]
                samples[name].append(roofs.seconds(lambda call=call, n=n: _often(call, n)) / n)
    return samples


def row(case: Case, dtype: torch.dtype, repeats: int, against: bool) -> Row:
    """Check one case, then time it."""
    torch.manual_seed(0)
    checked = check(case, dtype)
    job = work(case, dtype, against)
    agree(job, dtype)
    candidates = {"ours": job.ours} | job.others
    if dtype == torch.bfloat16:
        candidates["own fp32"] = work(case, torch.float32, False).ours
    samples = measure(candidates | {"GEMM": roofs.gemm(dtype)}, repeats)
    return Row(
        case,
        str(dtype).removeprefix("torch."),
        "itself" if checked == case.shape else str(checked),
        {name: statistics.median(taken) for name, taken in samples.items()},
        samples,
        job.cost.flops,
        job.cost.bytes,
        roofs.copy_rate(),
    )


def environment() -> dict:
    """Machine, versions, revision and date."""
    here = Path(__file__).parent

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=here, capture_output=True, text=True)
        return done.stdout.strip()

    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ekfac_fast": ekfac_fast.__version__,
        "extension": ops.coverage()["covariance"]["cpu"],
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "revision": git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else ""),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def cases(models: list[str], quantities: list[str]) -> Iterator[Case]:
    """The rows of the chosen models and quantities."""
    for model in models:
        yield from (case for case in layers(model) if case.quantity in quantities)


def print_roofs(rows: list[Row]) -> None:
    """The rates that the rows were measured against, lowest to highest of the run."""
    for dtype in dict.fromkeys(row.dtype for row in rows):
        rates = [roofs.gemm_flops() / r.seconds["GEMM"] / 1e9 for r in rows if r.dtype == dtype]
        print(f"roof: {dtype} GEMM {min(rates):.0f} to {max(rates):.0f} GFLOP/s")
    copies = [row.copy_rate / 1e9 for row in rows]
    print(f"roof: copy {min(copies):.1f} to {max(copies):.1f} GB/s")


def acceptance(rows: dict[tuple[Case, str], Row], quantities: list[str]) -> None:
    """The issue's table with what was measured beside what is required."""
    for need in ACCEPTANCE:
        if need.case.quantity in quantities:
            got = rows[need.case, need.dtype].times(need.against)
            form = "{:.0%}" if need.against == "GEMM roof" else "{:.2f}x"
            verdict = "met" if got >= need.ratio else "NOT MET"
            measured, required = form.format(got), form.format(need.ratio)
            print(
                f"{need.case.label} {need.dtype} | {need.against} | required {required} "
                f"| measured {measured} | {verdict}"
            )


def main() -> None:
    """Parse, check, time, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", choices=QUANTITIES, default=QUANTITIES)
    parser.add_argument("--shapes", nargs="+", choices=[*MODELS, "acceptance"], default=["gpt2"])
    dtypes = ["float32", "bfloat16", "float64"]
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=["float32"])
    parser.add_argument("--against", choices=["kronfluence-order"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    facts = environment()
    print(" | ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    models = [name for name in chosen.shapes if name != "acceptance"]
    jobs = [(case, dtype) for case in cases(models, chosen.op) for dtype in chosen.dtype]
    required = "acceptance" in chosen.shapes
    if required:
        jobs += [(r.case, r.dtype) for r in ACCEPTANCE if r.case.quantity in chosen.op]
    rows: dict[tuple[Case, str], Row] = {}
    against = required or chosen.against is not None
    for case, dtype in dict.fromkeys(jobs):
        rows[case, dtype] = done = row(case, getattr(torch, dtype), chosen.repeats, against)
        print(done, flush=True)
        if chosen.out:
            chosen.out.parent.mkdir(parents=True, exist_ok=True)
            with chosen.out.open("a") as file:
                file.write(json.dumps(done.record(facts)) + "\n")
    print_roofs(list(rows.values()))
    if required:
        acceptance(rows, chosen.op)


def _often(call: Callable, n: int) -> None:
    for _ in range(n):
        call()


if __name__ == "__main__":
    with torch.no_grad():
        main()
