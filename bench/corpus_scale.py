"""What a corpus of millions of sequences costs before its first pass: seconds and memory.

    python bench/corpus_scale.py [--sequences 10000000] [--tokens 512] [--folder /tmp]

A file of uint16 tokens and the ends of its sequences, of random lengths up to `--tokens`, is
written, measured in a process of its own, and deleted. Memory is the process's own (RssAnon of
/proc/self/status, sampled every 10 ms) and with the mapped pages of the file (ru_maxrss): those
belong to the page cache, which the kernel takes back when it needs to. On a machine that does other
work, the seconds of a core are what the step itself takes.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from torch import nn

from ekfac_fast.data import open_tokens
from ekfac_fast.data.batches import Batches
from ekfac_fast.stages.candidates import top_candidates
from ekfac_fast.store.folder import Store
from measure.peaks import Peak
from pages.markdown import table

VOCABULARY, WRITTEN_AT_ONCE = 50257, 1 << 24
BATCHES, QUERIES = 100, 8
TIMES, SIZES = ("seconds", "of a core"), ("own", "with files")


class Stub(nn.Module):
    """As much of a model as batches ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 1)

    def get_input_embeddings(self) -> nn.Module:
        """Whose rows are the vocabulary."""
        return self.table

    def forward(self, input_ids, attention_mask, labels):
        """Never called."""


def write(folder: Path, sequences: int, tokens: int) -> None:
    """`tokens.bin` and `ends.npy`."""
    rng = np.random.default_rng(0)
    ends = np.cumsum(rng.integers(1, tokens + 1, sequences))
    np.save(folder / "ends.npy", ends)
    with (folder / "tokens.bin").open("wb") as file:
        for start in range(0, int(ends[-1]), WRITTEN_AT_ONCE):
            count = min(WRITTEN_AT_ONCE, int(ends[-1]) - start)
            rng.integers(0, VOCABULARY, count, dtype=np.uint16).tofile(file)


def measured(folder: Path) -> dict[str, dict[str, float]]:
    """Open, survey (checks and fingerprint), plan, and the plan of a folder written and read."""
    peak = Peak()
    with peak.step("a model, after imports"):
        model = Stub()
    with peak.step("open"):
        ends = np.load(folder / "ends.npy", mmap_mode="r")
        data = open_tokens(folder / "tokens.bin", ends=ends)
    with peak.step("check and fingerprint"):
        batches = Batches(data, model)
    with peak.step("plan"):
        plan = batches.divided()
        batches.tokens(plan.indices)
    facts = {"data": batches.fingerprint()}
    with (
        peak.step("plan written and read"),
        Store.open(folder / "store", kind="scores", facts=facts) as store,
    ):
        assert store.batches(lambda: plan) == plan
    some = np.random.default_rng(0).integers(0, len(plan), BATCHES).tolist()
    with peak.step(f"{BATCHES} batches of {batches.batch_tokens} tokens, anywhere"):
        for number in some:
            batches.gathered(plan[number])
    asked = [data[i]["input_ids"].tolist() for i in range(QUERIES)]
    with peak.step(f"TF-IDF: the best 1000 of {QUERIES} queries"):
        top_candidates(asked, data, 1000, VOCABULARY)
    return peak.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=10_000_000)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--folder", type=Path, default=Path("/tmp"))
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        print(json.dumps(measured(asked.measure)))
        return
    with TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        write(folder, asked.sequences, asked.tokens)
        command = [sys.executable, __file__, "--measure", name]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        size = (folder / "tokens.bin").stat().st_size
    print(f"{asked.sequences} sequences, {size / 2e9:.2f} G tokens, {size / 2**30:.1f} GiB\n")
    rows = [
        [step, *(f"{x[part]:.2f}" for part in TIMES), *(f"{x[part] / 2**20:.0f}" for part in SIZES)]
        for step, x in found.items()
    ]
    sums = (sum(x[part] for x in found.values()) for part in TIMES)
    rows.append(["all", *(f"{total:.2f}" for total in sums), "", ""])
    print(table(["step", "seconds", "of a core", "own MiB so far", "with mapped files"], rows))


if __name__ == "__main__":
    main()
