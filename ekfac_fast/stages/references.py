"""Log-probabilities of pairs under a reference model, found once: what DPO compares with."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..checks import instance, path, require
from ..data.batches import data_fingerprint
from ..data.examples import Indexable, named
from ..data.forms import REFERENCES, Form, pair_form
from ..errors import ArgumentError, NotFiniteError, StoreError
from ..model.alone import alone
from ..model.identity import model_fingerprint
from ..model.tasks import LanguageModelTask
from ..store.files import load_noted, save_tensors
from .processes import Processes
from .run import Run, RunArguments, Stage


@dataclass(frozen=True, eq=False)
class Referenced(Dataset):
    """Pairs with `values` beside them, their log-probabilities under a reference: [N] each."""

    pairs: Any
    values: Mapping[str, Tensor]

    @property
    def form(self) -> Form:
        """What is read of an example."""
        return pair_form(self.values)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        said = {name: float(x[index]) for name, x in self.values.items()}
        return {**self.pairs[index], **said}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and name != "pairs":
            return getattr(self.pairs, name)
        raise AttributeError(name)


@torch.inference_mode(False)
def referenced(
    model: nn.Module | None,
    pairs: Indexable,
    *,
    file: str | Path | None = None,
    without_adapter: bool = False,
    **arguments: Unpack[RunArguments],
) -> Referenced:
    """Pairs with log p of each side under a reference model, as `PreferenceTask` wants them.

    Args:
        model: the reference, most often the model before its preferences were trained; None: what
            the file has.
        pairs: of `read_pairs`, or examples with `sides`; values that they have are replaced.
        file: keeps the values; where it has those of these pairs, no pass is made.
        without_adapter: the reference is peft's `model` with its adapters switched off.
        arguments: see `RunArguments`; without a task.

    Raises:
        StoreError: the file is of other pairs, or of another model.
        ArgumentError: there is neither model nor file.
        NotFiniteError: a log-probability is not finite; names the pair.
        ProcessError: another process of the run has failed.
    """
    file = None if file is None else path("file", file)
    if model is None and file is None:
        raise ArgumentError("referenced: give a model, or a file that has its values")
    notes = {"pairs": _identity(pairs)}
    if model is not None:
        instance("model", model, nn.Module, "a torch module")
        off: Any = getattr(model, "disable_adapter", None)
        require(not without_adapter or callable(off), "model", model, "a model with an adapter")
        notes |= {"model": model_fingerprint(model), "without_adapter": str(without_adapter)}
    if file is not None and (model is None or file.exists()):
        tensors, then = load_noted(file, ours=True)
        if wrong := [name for name, value in notes.items() if then.get(name) != value]:
            raise StoreError(
                f"{file}: log-probabilities with other {wrong[0]} (fingerprint "
                f"{then.get(wrong[0])}, now {notes[wrong[0]]}). Give another file, or remove it"
            )
        return Referenced(pairs, {name: tensors[name] for name in REFERENCES})
    assert model is not None
    processes = Processes.here()
    with processes.together():
        with off() if without_adapter else nullcontext():
            found = _log_probabilities(model, pairs, arguments, processes)
        values = dict(zip(REFERENCES, found, strict=True))
        if file is not None and processes.first:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(file, values, notes)
        processes.meet()
    return Referenced(pairs, values)


def has_references(file: Path, pairs: Indexable) -> bool:
    """Whether a file has the values of these pairs."""
    return file.exists() and load_noted(file, ours=True)[1].get("pairs") == _identity(pairs)


def without_its_adapter(file: Path) -> bool:
    """Whether the reference of a file's values was the model itself, its adapters switched off."""
    return load_noted(file, ours=True)[1].get("without_adapter") == str(True)


def _identity(pairs: Indexable) -> str:
    """Of the pairs without the values."""
    return data_fingerprint(pairs, pair_form())


class _Sides(LanguageModelTask):
    """A language model's task on pairs."""

    def form(self, model: nn.Module) -> Form:
        """Pairs."""
        return pair_form()


@torch.no_grad()
def _log_probabilities(
    model: nn.Module, pairs: Indexable, arguments: RunArguments, processes: Processes
) -> Tensor:
    """[2,N], fp64, in every process."""
    task = _Sides()
    run = Run(model, pairs, {**arguments, "task": task}, processes=processes)
    batches, done = list(run.batches.divided()), processes.counter(Stage.REFERENCES)
    total = run.batches.tokens(range(run.batches.size))
    mine = processes.mine(range(len(batches)))
    found = torch.zeros(2, run.batches.size, dtype=torch.float64)
    with alone(model), run.settings():
        for at in range(max(map(int, processes.gathered(len(mine))))):
            # Of a sharded model every pass is one of all processes together.
            some = batches[mine[min(at, len(mine) - 1)]] if len(mine) else batches[0]
            nll = task.negative_log_likelihoods(run.batches.load(some), model)
            if at < len(mine):
                found[:, list(some)] = -nll.view(-1, 2).mT.to("cpu", torch.float64)
                run.report(Stage.REFERENCES, done(run.batches.tokens(some)), total)
    wrong = (~found.isfinite()).any(0).nonzero()
    if len(wrong):
        where = named(pairs, int(wrong[0]))
        raise NotFiniteError(f"{where}: its log-probability under the reference is not finite")
    return torch.stack(processes.gathered(found)).sum(0)
