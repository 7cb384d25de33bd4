"""What a command is asked with `--task`: the model's class, the task, how its files are read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from ..checks import choice
from ..data.choices import Measure, Reduce
from ..data.fields import Named
from ..data.forms import REFERENCES
from ..data.pairs import Pairs, read_queries
from ..data.records import read_columns
from ..errors import ArgumentError
from ..model.classification import SequenceClassificationTask, TokenClassificationTask
from ..model.preferences import BETA, PairTask, PreferenceTask, RewardTask
from ..model.tasks import LanguageModelTask
from ..model.text_tasks import TextTask
from ..stages.references import has_references, referenced, without_its_adapter
from ..store.files import load_json
from .inputs import LABELLED, Cutting, Source, load, read_examples
from .options import Dtype, Kind
from .progress import showing
from .terminal import Terminal

LANGUAGE: Kind = "language-model"
# What a reference says of a corpus, and of queries: beside the folder, which is a stage's own.
REFERENCED, REFERENCED_QUERIES = ".references.safetensors", ".query_references.safetensors"


@dataclass(frozen=True)
class Questions:
    """A file of queries; those alike in a column are one, their `reduce`."""

    path: Path
    sets: str | None = None
    reduce: Reduce = "sum"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Asked:
    """`--task` and what goes with it; `reference` of DPO: a model's folder or name."""

    kind: Kind = LANGUAGE
    beta: float | None = None
    measure: Measure = "loss"
    reference: str | None = None

    def __post_init__(self) -> None:
        choice("--task", self.kind, get_args(Kind))
        for name, given in (("reference", self.reference), ("beta", self.beta)):
            if given is not None and self.kind != "dpo":
                raise ArgumentError(f"--{name} is for --task dpo")
        if self.measure != "loss" and self.kind == LANGUAGE:
            raise ArgumentError("--measure is for labels and pairs: give --task")

    def task(self, seed: int = 0) -> TextTask:
        """The task."""
        match self.kind:
            case "sequence-classification":
                return SequenceClassificationTask(self.measure, seed)
            case "token-classification":
                return TokenClassificationTask(self.measure, seed)
            case "reward":
                return RewardTask(self.measure, seed)
            case "dpo":
                return PreferenceTask(BETA if self.beta is None else self.beta, self.measure, seed)
        return LanguageModelTask(seed)

    @property
    def told(self) -> dict[str, Any]:
        """What is noted of it beside factors."""
        found = {"task": self.kind, "beta": self.beta}
        return {name: x for name, x in found.items() if x not in (None, LANGUAGE)}

    def measured(self, queries: Any, task: TextTask, reduce: str | None) -> str:
        """What `-measurement` of a query is, in words."""
        contrast = isinstance(queries, Pairs) and type(task) is LanguageModelTask
        words = "log p(completion) - log p(against)" if contrast else "log p"
        if isinstance(task, PairTask):
            words = "log p(chosen is preferred)"
        if isinstance(task, SequenceClassificationTask) and task.regression:
            words = "- squared error"
        if getattr(task, "measure", "loss") == "margin":
            words = words.replace("log p", "log-odds", 1)
        return words if reduce is None else f"{reduce} of {words}"


def fitted(
    kind: Kind | None, folder: Path, run: str, adapter: str | None = None, **more: Any
) -> Asked:
    """What factors were fitted for.

    Raises:
        ArgumentError: something else is asked, or of the model with another adapter.
    """
    file = folder / run
    told = load_json(file) if file.exists() else {}
    told = told if isinstance(told, dict) else {}
    theirs = told.get("adapter")
    if file.exists() and (theirs is None) != (adapter is None):
        raise ArgumentError(
            f"{folder} was fitted without an adapter: leave --adapter out, or fit with it"
            if theirs is None
            else f"{folder} was fitted with an adapter ({theirs}): give it as --adapter"
        )
    known: Kind = told["task"] if told.get("task") in get_args(Kind) else LANGUAGE
    if kind not in (None, known) and file.exists():
        raise ArgumentError(
            f"--task is {kind}, but {folder} was fitted with {known}: fit for what you ask, or "
            "leave --task out"
        )
    return Asked(kind or known, told.get("beta"), **more)


def beside(folder: Path, ending: str) -> Path:
    """A file of a folder's name."""
    return folder.with_name(folder.name + ending)


def labels_of(source: Source, kind: Kind) -> dict[str, int] | None:
    """Labels by name, of a model that has them."""
    config: Any = source.model.config
    return dict(config.label2id) if kind in LABELLED else None


def read_asked(
    asked: Asked,
    questions: Questions,
    source: Source,
    cutting: Cutting,
    folders: Sequence[Path],
    console: Terminal,
) -> tuple[Any, TextTask]:
    """The queries of a file, and the task that measures them: of a model trained on preferences
    they may be pairs or completions.
    """
    path, keep = questions.path, [questions.sets] if questions.sets else []
    refusing = replace(cutting, on_long="refuse", fields=None, references=None)
    if asked.kind == LANGUAGE or (asked.kind == "dpo" and not _of_preferences(path)):
        if asked.measure != "loss":
            raise ArgumentError(f"--measure is for pairs, but {path} has completions")
        return read_queries(path, source.tokenizer, cutting.context, keep=keep), LanguageModelTask()
    found = read_examples(path, source.tokenizer, refusing, keep)
    if asked.kind == "dpo":
        files = [beside(folder, REFERENCED_QUERIES) for folder in folders]
        found, _ = with_references(
            found, source, asked.reference, files, questions.trust_remote_code, console
        )
    return found, asked.task()


def _of_preferences(path: Path) -> bool:
    """Whether queries are pairs, by the first."""
    return "chosen" in read_columns(path, "line", Named(more=("chosen",)))[0]


def with_references(
    pairs: Any,
    source: Source,
    reference: str | None,
    files: Sequence[Path],
    trust_remote_code: bool,
    console: Terminal,
    **arguments: Any,
) -> tuple[Any, str | None]:
    """Pairs with their log-probabilities under the reference, and the file that keeps them: one of
    `files` that has them, else the last. Records that have them go as they are. Without a reference
    it is the model without its adapter.

    Raises:
        ArgumentError: there is neither.
    """
    if not isinstance(pairs, Pairs) or all(name in pairs.values for name in REFERENCES):
        return pairs, None
    file = next((file for file in files if has_references(file, pairs)), files[-1])
    if reference is None and file.exists():
        own = source.adapter is not None and without_its_adapter(file)
        model = source.model if own else None
        return referenced(model, pairs, file=file, without_adapter=own), str(file)
    if reference is None and source.adapter is None:
        raise ArgumentError(
            "--task dpo needs log-probabilities under the reference model: give --reference (the "
            f"model before its preferences were trained), or {' and '.join(REFERENCES)} in the "
            f"records; {pairs.source(0)} has none"
        )
    model = source.model
    if reference is not None:
        device = str(next(model.parameters()).device)
        dtype: Dtype = "float32" if source.autocast is None else "bfloat16"
        model = load(reference, trust_remote_code, dtype, device).model
    console.say(f"log-probabilities under {reference or 'the model without its adapter'}")
    with showing(console) as progress:
        found = referenced(
            model, pairs, file=file, without_adapter=reference is None, autocast=source.autocast,
            progress=progress, **arguments,
        )  # fmt: skip
    return found, str(file)
