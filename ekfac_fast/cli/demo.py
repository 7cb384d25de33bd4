"""The whole job on a laptop: a corpus, a model, questions, factors, scores, a report.

What differs between the demos is data (`Demo`): where model and corpus come from, how much of them
is used, and what a reader should know. From there on a demo runs the same functions as any user.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..data.examples import Corpus
from ..model.layers import select_layers
from ..report.text import duration
from ..stages.floor import floor_seconds
from ..stages.queries import Queries
from ..stages.run import Progress
from ..store.files import writing
from ..validation.one_step import step_check
from . import inputs, runs
from .progress import showing
from .terminal import Terminal


@dataclass(frozen=True)
class Demo:
    """What one demo is.

    prepare        makes `corpus`, `queries.jsonl` and `model` in a folder; what is there is kept
    notes          of the model's folder and the scanned data: what is weak about this demo
    context        tokens a sequence
    layers         of the model, to track; None for the MLPs
    fit_sequences  the factors are fitted on the first so many; None for all
    batch_tokens   of a batch
    """

    prepare: Callable[[Path, Progress], None]
    notes: Callable[[Path, Corpus], Sequence[str]]
    context: int
    layers: Callable[[nn.Module], list[str]] | None = None
    fit_sequences: int | None = None
    batch_tokens: int | None = None


def write_topics(folder: Path, first: Sequence[str], more: Callable[[str, int], bool]) -> Path:
    """Topics of Python's language reference, one text file each, those that are asked about first;
    as long as there are to be `more` (the next one's text, how many there are).
    """
    from pydoc_data.topics import topics

    folder.mkdir(parents=True, exist_ok=True)
    order = sorted(topics, key=lambda name: (name not in first, name))
    for number, name in enumerate(order):
        if more(topics[name], number):
            text = topics[name].strip() + "\n"
            (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def write_queries(path: Path, queries: Iterable[tuple[str, str, str]]) -> Path:
    """(name, prompt, completion) as JSON lines."""
    lines = (
        json.dumps({"name": name, "prompt": prompt, "completion": completion})
        for name, prompt, completion in queries
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def step_note(changes: Sequence[tuple[float, float]]) -> str:
    """How often one gradient step did what the scores say."""
    up = sum(top > 0 for top, _ in changes)
    down = sum(bottom < 0 for _, bottom in changes)
    return (
        "One gradient step on a query's top sequence raised the completion's log-probability for "
        f"{up} of {len(changes)} queries; one on its bottom sequence lowered it for {down}."
    )


def run(folder: Path, demo: Demo, console: Terminal) -> None:
    """The whole job, from nothing to a report."""
    start = time.perf_counter()
    with writing(folder, 4096):
        folder.mkdir(parents=True, exist_ok=True)
    with showing(console) as progress:
        demo.prepare(folder, progress)
    source = inputs.load(str(folder / "model"), False, device="cpu")
    cutting = inputs.Cutting(demo.context)
    corpus = inputs.read_data(folder / "corpus", source.tokenizer, cutting, console)
    factors = runs.fit_job(
        source, corpus, folder / "factors", console,
        layers=demo.layers and demo.layers(source.model),
        max_examples=demo.fit_sequences, batch_tokens=demo.batch_tokens,
    )  # fmt: skip
    out = folder / "scores"
    scores = runs.score_job(
        source, factors, folder / "queries.jsonl", corpus, cutting, out, console, rank=32,
        damping=None, batch_tokens=demo.batch_tokens,
    )  # fmt: skip
    runs.print_top(console, out, corpus, source.tokenizer)
    layers = select_layers(source.model, scores.layers)
    floor = floor_seconds(source.model, corpus, layers, batch_tokens=demo.batch_tokens)
    changes = step_check(source.model, Queries.load(out), scores, corpus)
    notes = [
        *demo.notes(folder / "model", corpus),
        step_note(changes),
        "Sequences that merely share words with a query come high beside those that explain it.",
    ]
    path = runs.report_job(out, corpus, source.tokenizer, folder / "report.html", 10, floor, notes)
    console.say()
    for note in notes:
        console.say(note)
    console.say(
        f"scan: {scores.seconds:.1f} s for {len(corpus)} sequences and {len(changes)} queries, "
        f"{scores.seconds / floor:.2f} x a forward and gradient-to-activations backward alone "
        f"({floor:.1f} s)"
    )
    console.say(f"{path}, after {duration(time.perf_counter() - start)}")
