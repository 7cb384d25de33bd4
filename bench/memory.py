"""Does a run take the memory that `plan` says, and keep to a budget?

    python bench/memory.py [--blocks 6] [--width 768] [--budget 0 1200MiB] [--folder /tmp]

A GPT-2 of random weights: `fit`, queries and scan, each in a process of its own, whose memory
beside the interpreter's and beside mapped files (RssAnon, sampled every 10 ms) is held against the
plan of that stage; "peak RSS" is all of the process, files and interpreter too. A budget of 0 is
none. The shape of GPT-2 XL, whose MLP layers take some 30 GiB at once:

    python bench/memory.py --blocks 48 --width 1600 --dtype bfloat16 --tokens 64 --fitted 4 \\
        --scanned 4 --queries 2 --budget 10GiB
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ekfac_fast import Factors, Queries, fit, prepare_queries, score
from ekfac_fast.checks import size
from ekfac_fast.model.layers import parameter_counts, select_layers
from ekfac_fast.stages.budget import head_size, token_width
from ekfac_fast.stages.plan import Plan, plan
from ekfac_fast.stages.run import Stage
from measure.environment import environment
from measure.peaks import Peak, anonymous
from pages.markdown import table

RANK = 32
# A command's stages in the plan.
STAGES = {
    "fit": (Stage.COVARIANCE, Stage.EIGENDECOMPOSITION, Stage.EIGENVALUE),
    "queries": (Stage.QUERIES,),
    "score": (Stage.SCAN,),
}
HEADS = ["budget", "parts", "stage", "planned MiB", "taken", "ratio", "peak RSS", "seconds"]
MIB = 2**20


@dataclass
class Job:
    """A model's shape and the sequences of its stages."""

    blocks: int = 6
    width: int = 768
    dtype: str = "float32"
    tokens: int = 128
    fitted: int = 96
    scanned: int = 32
    queries: int = 8

    def model(self) -> GPT2LMHeadModel:
        """The model, made in its dtype."""
        torch.manual_seed(0)
        config = GPT2Config(
            n_layer=self.blocks, n_embd=self.width, n_head=self.width // 64,
            n_positions=self.tokens, dtype=self.dtype,
        )  # fmt: skip
        return GPT2LMHeadModel._from_config(config).eval()

    def sequences(self, count: int, seed: int) -> list[dict[str, list[int]]]:
        """Random ones."""
        rng = np.random.default_rng(seed)
        return [{"input_ids": rng.integers(0, 50257, self.tokens).tolist()} for _ in range(count)]

    def run(self, stage: str, folder: Path, memory: str | None) -> dict[str, float]:
        """A stage's peak beside what the interpreter has, and all of the process's."""
        before, peak = anonymous(), Peak()
        with peak.step(stage):
            network = self.model()
            if stage == "fit":
                fit(network, self.sequences(self.fitted, 0), out=folder / "fit", memory=memory)
            elif stage == "queries":
                asked = [
                    x | {"labels": [-100] * (self.tokens - 1) + x["input_ids"][-1:]}
                    for x in self.sequences(self.queries, 1)
                ]
                prepare_queries(
                    network, Factors(folder / "fit"), asked, rank=RANK,
                    out=folder / "queries", memory=memory,
                )  # fmt: skip
            else:
                held, texts = Queries.load(folder / "queries"), self.sequences(self.scanned, 2)
                score(network, held, texts, out=folder / "scores", memory=memory)
        row = peak.rows[stage]
        return row | {"own": row["own"] - before}

    def plan(self, memory: str | None) -> Plan:
        """What `plan` says of it."""
        network = self.model()
        layers = select_layers(network)
        return plan(
            layers, parameters=parameter_counts(network, layers)[1], sequences=self.scanned,
            tokens=self.tokens, fit_sequences=self.fitted, queries=self.queries, rank=RANK,
            rate=1e11, width=token_width(network), head=head_size(network),
            dtype=getattr(torch, self.dtype),
            memory=None if memory is None else size("memory", memory),
        )  # fmt: skip


def compared(job: Job, budget: str, folder: Path) -> list[list[str]]:
    """The rows of one budget."""
    memory = None if budget == "0" else budget
    costs = job.plan(memory)
    memories, rows = {x.name: x.memory for x in costs.stages}, []
    with TemporaryDirectory(dir=folder) as work:
        for stage, names in STAGES.items():
            asked = json.dumps([asdict(job), stage, work, memory])
            command = [sys.executable, __file__, "--measure", asked]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            found, said = json.loads(done.stdout), max(memories[x] for x in names)
            rows.append([
                memory or "none", str(costs.partitions), stage, f"{said / MIB:.0f}",
                f"{found['own'] / MIB:.0f}", f"{found['own'] / said:.2f}",
                f"{found['with files'] / MIB:.0f}", f"{found['seconds']:.0f}",
            ])  # fmt: skip
    return rows


def main(words: list[str]) -> None:
    asked = vars(parser().parse_args(words))
    measure, budgets, folder = (asked.pop(x) for x in ("measure", "budget", "folder"))
    if measure:
        job, stage, work, memory = json.loads(measure)
        print(json.dumps(Job(**job).run(stage, Path(work), memory)))
        return
    job = Job(**asked)
    print(table(HEADS, [row for budget in budgets for row in compared(job, budget, folder)]))
    on = environment(torch.device("cpu"))
    print(f"{on['cpu']}, {on['threads']} thread(s), {on['date']}, torch {on['torch']}")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, given in asdict(Job()).items():
        parser.add_argument(f"--{name}", type=type(given), default=given)
    parser.add_argument("--budget", nargs="+", default=["0", "1200MiB"])
    parser.add_argument("--folder", type=Path, default=Path("/tmp"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
