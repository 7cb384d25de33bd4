"""A flipped bit in any result file is noticed by the step that reads the file.

Finished results are read; those that a kill left half done are continued. Two kinds of bits are in
no result and may be written over: columns of a matrix that nobody has filled yet, and the end of
the last mark, without which its batch counts as under way. `python
tests/test_bit_flips.py 2000` is the long leg: so many flips, spread evenly over all files.
"""

import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from dense_ekfac import asked, corpus, gpt2
from test_fuzz import results

from ekfac_fast import Error, fit, prepare_queries, score, self_scores
from ekfac_fast.store.folder import Pace


class Stopped(Exception):
    """As a kill is: in the middle of a stage, after progress was kept."""


def stopped(stage: str, batches: int) -> Callable[[str, int, int], None]:
    """Progress that ends a run when it has heard from a stage so often."""
    heard = []

    def told(name: str, done: int, total: int) -> None:
        heard.append(name)
        if heard.count(stage) == batches:
            raise Stopped

    return told


def begun(folder: Path) -> dict[Path, Callable[[Path], object]]:
    """Files of runs that were stopped in every stage; what reads them is the step, continued."""
    model, data, small = gpt2().eval(), corpus(), {"batch_tokens": 32}
    factors = fit(model, data, out=folder / "whole")
    queries = prepare_queries(model, factors, asked(), rank=4)
    fitted = partial(fit, model, data)
    scored = partial(score, model, queries, data)
    steps = {
        "covariance": ("covariance", fitted),
        "eigendecomposition": ("eigendecomposition", fitted),
        "eigenvalue": ("eigenvalue", fitted),
        "queries": ("queries", partial(prepare_queries, model, factors, asked())),
        "matrix": ("scan", scored),
        "heap": ("scan", partial(scored, top_k=3)),
        "details": ("detail", partial(scored, per_token=True, candidates="tfidf:8")),
        "self": ("scan", partial(self_scores, model, factors, data)),
    }
    files: dict[Path, Callable[[Path], object]] = {}
    for name, (stage, step) in steps.items():
        with pytest.raises(Stopped):
            step(out=folder / name, progress=stopped(stage, 1), **small)
        for path in sorted((folder / name).iterdir()):
            unread = any(path.match(pattern) for pattern in UNREAD.get(name, ()))
            if path.stat().st_size and not unread:
                files[path] = partial(continued, step, small)
    return files


# Of a stage that is over: its step has written what the next one reads, or writes it again.
UNREAD = {
    "eigendecomposition": ("*_covariance.safetensors", "num_*"),
    "eigenvalue": (
        "*_covariance.safetensors", "num_gradient_*", "*_eigenvalues.safetensors",
        "eigen_*", "covariance_state.*",
    ),
}  # fmt: skip


def continued(step: Callable, settings: dict, path: Path) -> object:
    """A step on a copy of the folder of `path`."""
    copy = path.parent.with_suffix(".copy")
    shutil.copytree(path.parent, copy)
    try:
        step(out=copy, **settings)
        return (copy / "scores.npy").read_bytes() if (copy / "scores.npy").exists() else None
    finally:
        shutil.rmtree(copy)


def finished(folder: Path) -> dict[Path, Callable[[Path], object]]:
    """Files of finished runs, with what reads them."""
    return {path: partial(_read, step) for path, step in results(folder).items()}


def _read(step: Callable[[], object], path: Path) -> object:
    step()
    return object()  # equal to no other: of a finished file every bit must be noticed


def flip(files: dict[Path, Callable[[Path], object]], count: int) -> tuple[list[str], int]:
    """`count` bits, one at a time, in turn in every file: those that nobody noticed; how many were
    written over, so that the scores are bitwise right.
    """
    rng, missed, mended = random.Random(0), [], 0
    paths, right = list(files), {path: step(path) for path, step in files.items()}
    for number in range(count):
        path = paths[number % len(paths)]
        whole = path.read_bytes()
        at, bit = rng.randrange(len(whole)), rng.randrange(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        try:
            found = files[path](path)
        except Error:
            pass
        except Exception as error:
            missed.append(f"{path.parent.name}/{path.name}, byte {at}, bit {bit}: {error!r:.150}")
        else:
            if path.name in ("scores.npy", "scores.done") and found == right[path]:
                mended += 1
            else:
                missed.append(f"{path.parent.name}/{path.name}, byte {at}, bit {bit}: not noticed")
        path.write_bytes(whole)
    return missed, mended


def every(folder: Path, patch: pytest.MonkeyPatch) -> dict[Path, Callable[[Path], object]]:
    """All files; progress is kept after every batch."""
    patch.setattr(Pace, "due", True)
    (folder / "begun").mkdir()
    return finished(folder) | begun(folder / "begun")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_flipped_bit_is_noticed(tmp_path, monkeypatch):
    files = every(tmp_path, monkeypatch)
    missed, _ = flip(files, 2 * len(files))
    assert not missed


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp())
    with pytest.MonkeyPatch.context() as patch:
        files, flips = every(folder, patch), int(sys.argv[1])
        bad, mended = flip(files, flips)
    shutil.rmtree(folder)
    print("\n".join(bad))
    print(
        f"{flips} flipped bits in {len(files)} files: {flips - mended - len(bad)} noticed, "
        f"{mended} written over before anybody read them, {len(bad)} missed"
    )
    sys.exit(bool(bad))
