"""A whole job raced: fit, queries and scan of a real model, each tool in a process of its own.

    python bench/race.py [--model demo/model | smollm2] [--queries 1 8 128] [--runs 3] [--blocks 10]

Contestants take turns, so that a busy minute meets all of them. Model and text are the same for
all; every stage counts, the imports and the model's loading too. Scores agree as far as labels
drawn by different generators let them: Spearman's rho to our fp32 run, the mean over queries.
Peers run in environments of their own (`ways/racers/environments.py`). A contestant that
cannot be installed, fails, or wants more memory than there is, is told with its reason and races no
further; the others do.
"""

import argparse
import importlib.metadata
import json
import resource
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from ekfac_fast.curvature.memory import free_bytes
from measure.environment import environment
from measure.rows import OURS, Row, append
from pages import tables
from pages.markdown import duration
from ways.racers import environments, job
from ways.racers.environments import Failed

BENCH = Path(__file__).parent
WORK = BENCH.parent / "build" / "race"
ENVIRONMENTS = WORK / "environments"
KRONFLUENCE = str(BENCH / "ways" / "racers" / "theirs.py")


@dataclass(frozen=True)
class Contestant:
    """A process: arguments of python before MODEL JOB OUT and after; `peer` names its own pins."""

    before: tuple[str, ...]
    after: tuple[str, ...] = ()
    peer: str | None = None


CONTESTANTS = {
    OURS: Contestant(("-m", "ways.racers.ours"), ("float32",)),
    "ours, bf16": Contestant(("-m", "ways.racers.ours"), ("bfloat16",)),
    "kronfluence": Contestant((KRONFLUENCE,)),
    "kronfluence on our backend": Contestant(("-m", "ekfac_fast.kronfluence", KRONFLUENCE)),
    "bergson": Contestant(("-m", "ways.racers.bergson"), peer="bergson"),
    "dattri-LLM": Contestant(("-m", "ways.racers.dattri"), peer="dattri-llm"),
}


@dataclass(frozen=True)
class Run:
    """One run of one contestant: seconds by stage, of all its threads, bytes at the peak, scores
    [Q,N].
    """

    stages: dict[str, float]
    cpu: float
    peak: int
    scores: np.ndarray


def installed(names: list[str], folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Interpreters by contestant, and why a contestant has none."""
    found, failed = {}, {}
    for name in names:
        peer = CONTESTANTS[name].peer
        try:
            found[name] = environments.python(peer, folder) if peer else sys.executable
        except Failed as error:
            failed[name] = f"not installed: {error}"
    return found, failed


def run(name: str, python: str, model: Path, task: Path, out: Path, memory: int) -> Run:
    """One run of one contestant, which is refused more than `memory` bytes.

    Raises:
        Failed: it ended with an error; says its last line.
    """
    entered = CONTESTANTS[name]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    files = map(str, (model, task, out))
    told = environments.said(
        [python, "-W", "ignore", *entered.before, *files, *entered.after],
        cwd=BENCH,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (memory, memory)),
    )
    lines = [json.loads(x) for x in told.splitlines() if x.startswith('{"stage":')]
    stages: dict[str, float] = {}
    for x in lines:
        stages[x["stage"]] = stages.get(x["stage"], 0) + x["seconds"]
    scores = np.load(out / "scores.npy")
    shutil.rmtree(out)
    cpu, peak = sum(x["cpu_seconds"] for x in lines), max(x["peak_bytes"] for x in lines)
    return Run(stages, cpu, peak, scores)


def agreement(expected: np.ndarray, found: np.ndarray) -> float:
    """Spearman's rho, the mean over queries."""
    pairs = zip(expected, found, strict=True)
    return float(np.mean([spearmanr(x, y).statistic for x, y in pairs]))


def medians(runs: list[Run]) -> dict[str, float]:
    """Seconds by stage."""
    return {stage: statistics.median(x.stages[stage] for x in runs) for stage in runs[0].stages}


def race(
    model: Path,
    work: Path,
    pythons: dict[str, str],
    runs: int,
    shape: dict[str, int],
    memory: int,
    failed: dict[str, str],
) -> Row:
    """All contestants in turn, `runs` times; `failed` are those that cannot start."""
    task, failed = work / "job.json", dict(failed)
    job.write(task, model, memory=memory, **shape)
    found: dict[str, list[Run]] = {name: [] for name in pythons}
    for turn in range(runs):
        for name in [name for name in pythons if name not in failed]:
            out = work / name.replace(" ", "_")
            try:
                found[name].append(run(name, pythons[name], model, task, out, memory))
            except Failed as error:
                failed[name] = str(error)
                shutil.rmtree(out)  # gigabytes, of some
                print(error.told[-3000:], file=sys.stderr)
                print(f"{turn + 1}: {name} failed: {error}", flush=True)
            else:
                last = found[name][-1]
                total = f"{duration(sum(last.stages.values()))} ({duration(last.cpu)} of threads)"
                print(f"{turn + 1}: {name} {total}", flush=True)
    found = {name: each for name, each in found.items() if name not in failed}
    totals = {name: [sum(x.stages.values()) for x in each] for name, each in found.items()}
    ours = found[OURS][-1].scores if OURS in found else None
    return Row(
        bench="race",
        name=model.name if model.name != "model" else model.parent.name,
        quantity="job",
        shape=shape,
        dtype="float32",
        seconds={name: statistics.median(x) for name, x in totals.items()},
        samples=totals,
        extra_bytes={name: max(x.peak for x in each) for name, each in found.items()},
        failed=failed,
        details={
            "stages": {name: medians(each) for name, each in found.items()},
            "spearman": {
                name: agreement(ours, each[-1].scores)
                for name, each in found.items()
                if ours is not None
            },
            "cpu_seconds": {
                name: statistics.median(x.cpu for x in each) for name, each in found.items()
            },
            "versions": versions([*found, *failed]),
            "memory_bytes": memory,
        },
        environment=environment(torch.device("cpu")),
    )


def versions(names: list[str]) -> dict[str, str]:
    """Of the tools that are not ours."""
    found = {name: environments.version(peer) for name in names if (peer := CONTESTANTS[name].peer)}
    if "kronfluence" in names:
        found["kronfluence"] = importlib.metadata.version("kronfluence")
    return found


def main(words: list[str] | None = None) -> None:
    """Race, print, append to bench/results/race.jsonl: a row for each number of queries."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="a folder, or smollm2")
    parser.add_argument("--queries", type=int, nargs="+", default=[8], help="one job each")
    parser.add_argument("--fit", type=int, default=32, help="sequences fitted on")
    parser.add_argument("--scan", type=int, default=64, help="sequences scored")
    parser.add_argument("--blocks", type=int, default=10, help="the first so many are tracked")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--memory", type=float, help="GiB each may take: what is free at the start")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--out", type=Path, default=BENCH / "results" / "race.jsonl")
    chosen = parser.parse_args(words)
    chosen.work.mkdir(parents=True, exist_ok=True)
    model = (
        job.smollm2(chosen.work / "smollm2") if chosen.model == "smollm2" else Path(chosen.model)
    )
    pythons, failed = installed(chosen.only, ENVIRONMENTS)
    for name, reason in failed.items():
        print(f"{name}: {reason}", flush=True)
    memory = int(chosen.memory * 2**30) if chosen.memory else free_bytes(torch.device("cpu"))
    for queries in chosen.queries:
        shape = {
            "fit": chosen.fit,
            "scan": chosen.scan,
            "queries": queries,
            "blocks": chosen.blocks,
        }
        row = race(model.resolve(), chosen.work, pythons, chosen.runs, shape, memory, failed)
        append(chosen.out, [row])
        print(tables.race([row]))


if __name__ == "__main__":
    main()
