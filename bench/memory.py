"""Does a run take the memory that `plan` says, and keep to a budget?

    python bench/memory.py [--blocks 6] [--width 768] [--budget 0 1200MiB] [--folder /tmp]

A GPT-2 of random weights: `fit`, queries and scan, each in a process of its own, whose memory
beside the interpreter's and beside mapped files (RssAnon, sampled every 10 ms) is held against the
plan of that stage. A budget of 0 is none.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ekfac_fast import Factors, Queries, fit, prepare_queries, score
from ekfac_fast.checks import size
from ekfac_fast.model.layers import parameter_counts, select_layers
from ekfac_fast.stages.budget import token_width
from ekfac_fast.stages.plan import Plan, plan
from measure.environment import environment
from measure.peaks import Peak, anonymous
from pages.markdown import table

FITTED, SCANNED, TOKENS, QUERIES, RANK = 96, 32, 128, 8, 32
# A command's stages in the plan.
STAGES = {
    "fit": ("covariance", "eigendecomposition", "eigenvalues"),
    "queries": ("queries",),
    "score": ("scan",),
}
MIB = 2**20


def model(blocks: int, width: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=blocks, n_embd=width, n_head=width // 64, n_positions=TOKENS)
    return GPT2LMHeadModel(config).eval()


def sequences(count: int, seed: int) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(seed)
    return [{"input_ids": rng.integers(0, 50257, TOKENS).tolist()} for _ in range(count)]


def measured(stage: str, folder: Path, blocks: int, width: int, memory: str | None) -> dict:
    """A stage's peak beside what the interpreter has, and with mapped files."""
    before, peak = anonymous(), Peak()
    with peak.step(stage):
        network, settings = model(blocks, width), {"memory": memory}
        if stage == "fit":
            fit(network, sequences(FITTED, 0), out=folder / "fit", **settings)
        elif stage == "queries":
            asked = [x | {"labels": [-100] * (TOKENS - 1) + x["input_ids"][-1:]}
                     for x in sequences(QUERIES, 1)]  # fmt: skip
            factors = Factors(folder / "fit")
            prepare_queries(network, factors, asked, rank=RANK, out=folder / "queries", **settings)
        else:
            held = Queries.load(folder / "queries")
            score(network, held, sequences(SCANNED, 2), out=folder / "scores", **settings)
    row = peak.rows[stage]
    return {"own": row["own"] - before, "with files": row["with files"], "seconds": row["seconds"]}


def planned(blocks: int, width: int, memory: str | None) -> Plan:
    network = model(blocks, width)
    layers = select_layers(network)
    return plan(
        layers, parameters=parameter_counts(network, layers)[1], sequences=SCANNED,
        tokens=TOKENS, fit_sequences=FITTED, queries=QUERIES, rank=RANK, rate=1e11,
        width=token_width(network), memory=None if memory is None else size("memory", memory),
    )  # fmt: skip


def main(words: list[str]) -> None:
    asked = parser().parse_args(words)
    if asked.measure:
        stage, folder, memory = json.loads(asked.measure)
        print(json.dumps(measured(stage, Path(folder), asked.blocks, asked.width, memory)))
        return
    rows = []
    for budget in asked.budget:
        memory = None if budget == "0" else budget
        costs = planned(asked.blocks, asked.width, memory)
        memories = {x.name: x.memory for x in costs.stages}
        with TemporaryDirectory(dir=asked.folder) as folder:
            for stage, names in STAGES.items():
                command = [
                    sys.executable,
                    __file__,
                    "--measure",
                    json.dumps([stage, folder, memory]),
                ]
                command += ["--blocks", str(asked.blocks), "--width", str(asked.width)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
                found, said = json.loads(done.stdout), max(memories[x] for x in names)
                rows.append([
                    budget if memory else "none", str(costs.partitions), stage,
                    f"{said / MIB:.0f}", f"{found['own'] / MIB:.0f}", f"{found['own'] / said:.2f}",
                    f"{found['with files'] / MIB:.0f}", f"{found['seconds']:.0f}",
                ])  # fmt: skip
    heads = [
        "budget",
        "parts",
        "stage",
        "planned MiB",
        "taken",
        "ratio",
        "with all files",
        "seconds",
    ]
    print(table(heads, rows))
    on = environment(torch.device("cpu"))
    print(f"{on['cpu']}, {on['threads']} thread(s), {on['date']}, torch {on['torch']}")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--budget", nargs="+", default=["0", "1200MiB"])
    parser.add_argument("--folder", type=Path, default=Path("/tmp"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
