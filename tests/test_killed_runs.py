"""Every stage, by the API and by the command line, survives kill -9 at any moment.

A run that was killed continues, half of the time where another number of threads is asked for,
perhaps to be killed again, and its files end bitwise as those of a run that nobody disturbed.
Progress is made durable after every batch here, so no batch that was reported is ever worked on
again: a kill repeats the one that was under way.
`python tests/test_killed_runs.py 200` is the long leg.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from dense_ekfac import asked, corpus, gpt2
from safetensors import safe_open

from ekfac_fast import fit, prepare_queries, score
from ekfac_fast.store.folder import Store

STAGES = ("fit", "queries", "refined", "score", "heap", "details", "self")
COMMANDS = ("fit", "score", "self")
JOBS = [("api", stage) for stage in STAGES] + [("command", stage) for stage in COMMANDS]

# One interpreter forks a child per line of input: torch is imported once. It has one thread, as
# no pool of threads survives a fork.
RUNS = """
import json, os, sys, time, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
root = sys.argv[2]
import torch
torch.set_num_threads(1)
from pathlib import Path
from dense_ekfac import asked, corpus, gpt2
from transformers.utils import logging
from ekfac_fast import Factors, Queries, fit, prepare_queries, score, self_scores
from ekfac_fast.cli import app, runs
from ekfac_fast.cli import demo_small as demo
from ekfac_fast.data import read, tokenize
from ekfac_fast.store import folder

logging.disable_progress_bar()
folder.Pace.due = property(lambda self: True)
model, data, questions, small = gpt2().eval(), corpus(40), asked(4), {"batch_tokens": 32}
home = Path(root) / "inputs"
if not (home / "model").exists():
    demo.write_corpus(home / "corpus", 3)
    demo.VOCABULARY, demo.LAYERS, demo.WIDTH, demo.HEADS = 512, 2, 32, 2
    tokenizer = demo.train_tokenizer(home / "corpus", home / "model")
    text = tokenize(read(home / "corpus"), tokenizer, 128)
    demo.train_model(text, home / "model", 1)
    rows = [{"prompt": p, "completion": c} for _, p, c in demo.QUERIES[:3]]
    (home / "queries.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))

def job(way, stage, out, made):
    def told(stage, done, total):
        with open(out + ".log", "a") as file:
            file.write(f"{stage} {done}\\n")
    known = small | {"progress": told}
    if way == "command":
        class Bars:
            def __enter__(self): return told
            def __exit__(self, *_): pass
        runs.showing = lambda console: Bars()
        given = {
            "fit": [home / "corpus"],
            "score": [made / "command-fit", home / "queries.jsonl", home / "corpus"],
            "self": [made / "command-fit", home / "corpus"],
        }[stage]
        words = [stage, home / "model", *given, "--out", out, "--batch-tokens", 512]
        return app(list(map(str, words)), standalone_mode=False)
    if stage == "fit":
        return fit(model, data, out=out, **known)
    factors = Factors(made / "api-fit")
    if stage == "queries":
        return prepare_queries(model, factors, questions, rank=4, out=out, **known)
    if stage == "refined":
        more = {"refine": "cg:3", "dataset": data, "refine_examples": 12}
        return prepare_queries(model, factors, questions, rank=4, out=out, **more, **known)
    if stage == "self":
        return self_scores(model, factors, data, out=out, **known)
    more = {"heap": {"top_k": 3}, "details": {"attribution": True}}.get(stage, {})
    score(model, Queries.load(made / "api-queries"), data, out=out, **more, **known)

for line in sys.stdin:
    way, stage, out, threads, delay = json.loads(line)
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        torch.set_num_threads(threads)
        try:
            job(way, stage, out, Path(root) / "whole")
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    start = time.monotonic()
    if delay:
        time.sleep(delay)
        os.kill(child, 9)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, time.monotonic() - start, flush=True)
"""


class Runs:
    """A call starts or continues a job: its exit code (-9: killed in time) and seconds."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "whole").mkdir()
        (root / "inputs").mkdir()
        (root / "others").mkdir()
        code = [sys.executable, "-c", RUNS, os.path.dirname(os.path.abspath(__file__)), str(root)]
        self.parent = subprocess.Popen(
            code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        )  # fmt: skip

    def __call__(
        self, way: str, stage: str, out: Path, threads: int = 1, delay: float = 0
    ) -> tuple[int, float]:
        line = json.dumps([way, stage, str(out), threads, delay])
        print(line, file=self.parent.stdin, flush=True)
        code, seconds = self.parent.stdout.readline().split()
        return int(code), float(seconds)

    def close(self) -> None:
        self.parent.stdin.close()
        self.parent.wait(30)
        self.parent.stdout.close()


def content(path: Path) -> object:
    """Of a file, all but times and their checksums, and the order of marks."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="np") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return {name: (x.shape, x.dtype.str, x.tobytes()) for name, x in found.items()}
    if path.suffix == ".json":
        found = json.loads(path.read_text())
        for time_of in ("created", "finished", "checksum", "seconds"):
            found.pop(time_of, None)
        for time_of in ("seconds", "scan_seconds"):
            found.get("state", {}).pop(time_of, None)
        return found
    if path.suffix == ".done":
        return {*path.read_bytes().splitlines()}
    return path.read_bytes()


def contents(folder: Path) -> dict[str, object]:
    """Of every file in a folder and below."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): content(path) for path in files}


def killed(runs: Runs, count: int) -> str:
    """`count` kills at random moments of all jobs in turn; asserts all that the module promises."""
    rng, times, jobs, kills, switched = random.Random(count), {}, 0, 0, 0
    expected: dict[tuple[tuple[str, str], int], dict[str, object]] = {}

    def undisturbed(job: tuple[str, str], threads: int) -> dict[str, object]:
        """A whole run's files; those on one thread stay, for the jobs that follow."""
        if (job, threads) not in expected:
            out = runs.root / ("whole" if threads == 1 else "others") / "-".join(job)
            code, times[job] = runs(*job, out, threads)
            assert code == 0, job
            expected[job, threads] = contents(out)
        return expected[job, threads]

    for job in JOBS:
        undisturbed(job, 1)
    while kills < count:
        job, out = JOBS[jobs % len(JOBS)], runs.root / f"{jobs}"
        threads, jobs, code = 1, jobs + 1, -signal.SIGKILL
        while code:
            again = kills < count and rng.random() < (1 if not out.exists() else 0.5)
            delay = rng.uniform(0.02, 1) * times[job] if again else 0
            code, _ = runs(*job, out, threads, delay)
            assert code in (0, -signal.SIGKILL), (job, out)
            if code:
                kills += 1
                if rng.random() < 0.5:
                    threads, switched = 3 - threads, switched + 1
        # Of a run that was killed before it began, the next start is the first one.
        found, whole = contents(out), undisturbed(job, Store.load(out).state["threads"])
        assert found.keys() == whole.keys(), job
        differs = [name for name in found if found[name] != whole[name]]
        assert not differs, (job, differs)
        worked = Path(f"{out}.log").read_text().splitlines()
        assert len(worked) == len({*worked}), f"{job}: a batch that was kept was worked on again"
        shutil.rmtree(out)
    return (
        f"{kills} kills in {jobs} runs, {switched} times continued under another number of "
        "threads: no batch twice, all bitwise equal"
    )


@pytest.mark.slow
def test_killed_at_random_moments_and_continued_bitwise(tmp_path):
    runs = Runs(tmp_path)
    try:
        killed(runs, 6)
    finally:
        runs.close()


def test_killed_before_it_is_marked_finished_repeats_no_detail(tmp_path, monkeypatch):
    model, data = gpt2().eval(), corpus()
    queries = prepare_queries(model, fit(model, data, out=tmp_path / "f"), asked())

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            score(model, queries, data, out=tmp_path / "s", per_token=True)
    told = []
    scores = score(
        model, queries, data, out=tmp_path / "s", per_token=True, progress=lambda *x: told.append(x)
    )
    assert not told
    assert scores.details(0)
    assert not list((tmp_path / "s").glob("detail_*"))


if __name__ == "__main__":
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder))
        said = killed(runs, int(sys.argv[1]))
        runs.close()
    print(f"{said} ({time.monotonic() - start:.0f} s)")
