"""What checks and hashes cost: their share of a scan's time, in the process that scans.

    python bench/check_costs.py [--model smollm2 | demo/model] [--scan 64] [--blocks 10]

Everything that is there only so that no wrong answer passes is timed where it is called: the data
read and checked before the pass, the weights' fingerprint, the two trials of the model, the marks
and checksums of files. Factors and queries are made in the same process before, as users do it.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM

import ekfac_fast
from ekfac_fast.data.batches import Batches
from ekfac_fast.stages import run
from ekfac_fast.store import files
from ekfac_fast.store.matrix import Matrix
from ways.racers import job

CHECKS = {
    "data read, checked and hashed": (Batches, "_survey"),
    "weights hashed": (run, "model_fingerprint"),
    "weights in memory": (run, "check_weights"),
    "causal, padding, positions": (run.LanguageModelTask, "check"),
    "checksums of tensors": (files, "_checksum"),
    "checksums of scores": (Matrix, "_crc"),
}


@contextmanager
def timed(spent: dict[str, float]) -> Iterator[None]:
    """Seconds of every check into `spent`."""
    with ExitStack() as patched:
        for name, (owner, attribute) in CHECKS.items():
            patched.enter_context(
                patch.object(owner, attribute, watched(getattr(owner, attribute), name, spent))
            )
        yield


def watched(call: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    """A function that notes how long it took."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            spent[name] += time.perf_counter() - start

    return wrapped


def main(words: list[str] | None = None) -> None:
    """Fit, prepare, scan; print the scan's checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="a folder, or smollm2")
    parser.add_argument("--scan", type=int, default=64, help="sequences of 128 tokens")
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--work", type=Path, default=Path("build/race"))
    chosen = parser.parse_args(words)
    chosen.work.mkdir(parents=True, exist_ok=True)
    folder = (
        job.smollm2(chosen.work / "smollm2") if chosen.model == "smollm2" else Path(chosen.model)
    )
    task = chosen.work / "checks.json"
    job.write(task, folder, fit=8, scan=chosen.scan, queries=8, blocks=chosen.blocks, memory=0)
    told = json.loads(task.read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    data = {part: [{"input_ids": x} for x in told[part]] for part in ("fit", "scan")}
    with tempfile.TemporaryDirectory() as out:
        factors = ekfac_fast.fit(model, data["fit"], out=f"{out}/f", layers=told["layers"])
        queries = ekfac_fast.prepare_queries(model, factors, told["queries"], rank=32)
        spent: dict[str, float] = defaultdict(float)
        start = time.perf_counter()
        with timed(spent):
            ekfac_fast.score(model, queries, data["scan"], out=f"{out}/s")
        total = time.perf_counter() - start
    print(f"scan of {chosen.scan} sequences: {total:.1f} s")
    for name in CHECKS:
        print(f"{name:32}{1e3 * spent[name]:8.1f} ms {spent[name] / total:7.2%}")
    every = sum(spent.values())
    print(f"{'together':32}{1e3 * every:8.1f} ms {every / total:7.2%}")


if __name__ == "__main__":
    main()
