"""A fit in parts: each is one of some layers, in a folder of its own; together they are one's.

Labels, batches and passes of a part are those of all layers, and so are its factors.
"""

import shutil
from collections import Counter
from pathlib import Path

from torch import Tensor

from ..store.files import load_json, load_tensors, save_json, save_tensors
from ..store.folder import Store
from .disk import results_of
from .export import ARGUMENTS
from .factors import DROPPED, SUMMED


def part_folder(store: Store, number: int) -> Path:
    """Where a part is fitted."""
    return store.folder / f"partition-{number}"


def put_together(store: Store, parts: int) -> None:
    """The files of all parts as one's, each written before those it is made of go.

    Mapped on either side: hardly anything of them is in memory at a time.
    """
    folders = [part_folder(store, number) for number in range(parts)]
    kept = store.state["keep_covariances"]
    for name in results_of(store):
        if not (store.folder / name).exists():
            whole: dict[str, Tensor] = {}
            for folder in folders:
                whole |= load_tensors(folder / name, ours=True)
            save_tensors(store.folder / name, whole)
        for folder in folders:
            (folder / name).unlink(missing_ok=True)
    states = [Store.load(folder).state for folder in folders]
    save_json(store.folder / ARGUMENTS, load_json(folders[0] / ARGUMENTS), checksum=False)
    seconds = Counter[str]()
    for state in states:
        seconds.update(state["seconds"])
    tracked = sum(state["parameters"][0] for state in states)
    # Every part draws the same labels.
    common = {n: states[0][n] for n in ("sequences", "truncated", "without_targets", "edge_draws")}
    common["shared"] = {name: of for state in states for name, of in state["shared"].items()}
    common["covariances"] = SUMMED if kept else DROPPED
    common["parameters"] = [tracked, states[0]["parameters"][1]]
    store.finish(results_of(store), seconds=dict(seconds), **common)
    for folder in folders:
        shutil.rmtree(folder)
