"""A whole job raced: fit, queries and scan of a real model, each tool in a process of its own.

    python bench/race.py [--model demo/model | smollm2] [--queries 8] [--runs 3] [--blocks 10]

Contestants take turns, so that a busy minute meets all of them. Model and text are the same for
all; every stage counts, the imports and the model's loading too. Scores agree as far as labels
drawn by different generators let them: Spearman's rho to our fp32 run, the mean over queries.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from measure.environment import environment
from measure.rows import OURS, Row, append
from pages import tables
from pages.markdown import duration
from ways.racers import job

BENCH = Path(__file__).parent
RACERS = BENCH / "ways" / "racers"
KRONFLUENCE = RACERS / "theirs.py"
# name -> (arguments of python before MODEL JOB OUT, and after)
CONTESTANTS: dict[str, tuple[list[str], list[str]]] = {
    OURS: (["-m", "ways.racers.ours"], ["float32"]),
    "ours, bf16": (["-m", "ways.racers.ours"], ["bfloat16"]),
    "kronfluence": ([str(KRONFLUENCE)], []),
    "kronfluence on our backend": (["-m", "ekfac_fast.kronfluence", str(KRONFLUENCE)], []),
}


def run(name: str, model: Path, task: Path, out: Path) -> list[dict]:
    """One run of one contestant: its stages.

    Raises:
        SystemExit: it failed; shows what it said.
    """
    before, after = CONTESTANTS[name]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    command = [sys.executable, "-W", "ignore", *before, *map(str, (model, task, out)), *after]
    done = subprocess.run(command, cwd=BENCH, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    lines = [json.loads(x) for x in done.stdout.splitlines() if x.startswith('{"')]
    return [x for x in lines if "stage" in x]


def agreement(expected: np.ndarray, found: np.ndarray) -> float:
    """Spearman's rho, the mean over queries."""
    pairs = zip(expected, found, strict=True)
    return float(np.mean([spearmanr(x, y).statistic for x, y in pairs]))


def race(model: Path, work: Path, names: list[str], runs: int, shape: dict[str, int]) -> Row:
    """All contestants in turn, `runs` times."""
    task = work / "job.json"
    job.write(task, model, **shape)
    totals: dict[str, list[float]] = {name: [] for name in names}
    stages: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    peaks: dict[str, int] = {}
    scores: dict[str, np.ndarray] = {}
    for turn in range(runs):
        for name in names:
            out = work / name.replace(" ", "_")
            found = run(name, model, task, out)
            totals[name].append(sum(x["seconds"] for x in found))
            for x in found:
                stages[name].setdefault(x["stage"], []).append(x["seconds"])
            peaks[name] = max(peaks.get(name, 0), *(x["peak_bytes"] for x in found))
            scores[name] = np.load(out / "scores.npy")
            shutil.rmtree(out)
            print(f"{turn + 1}: {name} {duration(totals[name][-1])}", flush=True)
    return Row(
        bench="race",
        name=model.name if model.name != "model" else model.parent.name,
        quantity="job",
        shape=shape,
        dtype="float32",
        seconds={name: statistics.median(x) for name, x in totals.items()},
        samples=totals,
        extra_bytes=peaks,
        details={
            "stages": {
                name: {stage: statistics.median(x) for stage, x in each.items()}
                for name, each in stages.items()
            },
            "spearman": {name: agreement(scores[names[0]], x) for name, x in scores.items()},
        },
        environment=environment(torch.device("cpu")),
    )


def main(words: list[str] | None = None) -> None:
    """Race, print, append to bench/results/race.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="a folder, or smollm2")
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--fit", type=int, default=32, help="sequences fitted on")
    parser.add_argument("--scan", type=int, default=64, help="sequences scored")
    parser.add_argument("--blocks", type=int, default=10, help="the first so many are tracked")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--work", type=Path, default=BENCH.parent / "build" / "race")
    parser.add_argument("--out", type=Path, default=BENCH / "results" / "race.jsonl")
    chosen = parser.parse_args(words)
    chosen.work.mkdir(parents=True, exist_ok=True)
    model = (
        job.smollm2(chosen.work / "smollm2") if chosen.model == "smollm2" else Path(chosen.model)
    )
    shape = {
        "fit": chosen.fit,
        "scan": chosen.scan,
        "queries": chosen.queries,
        "blocks": chosen.blocks,
    }
    row = race(model.resolve(), chosen.work, chosen.only, chosen.runs, shape)
    append(chosen.out, [row])
    print(tables.race([row]))


if __name__ == "__main__":
    main()
