"""`ekfac-fast study`: the paper's experiments on any model."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..checks import whole
from ..data.choices import Split
from .options import (
    Context,
    Damping,
    Data,
    Dtype,
    FactorFolder,
    Model,
    Precision,
    SplitBy,
    Trust,
)
from .reported import console, reported
from .terminal import harmless

if TYPE_CHECKING:
    from ..data.tokens import Tokens
    from . import inputs

app = typer.Typer(no_args_is_help=True, help="The paper's experiments on any model.")

Results = Annotated[Path, typer.Option(help="folder of the results: JSON lines and a drawing")]
Rank = Annotated[int, typer.Option(help="of a question's gradients; 0: full rank")]


@app.command()
@reported
def corpus(
    out: Annotated[Path, typer.Option(help="JSON lines: text, kind")] = Path("corpus.jsonl"),
    root: Annotated[
        Path, typer.Option(help="where Debian's packages are installed or unpacked")
    ] = Path("/"),
    each: Annotated[int, typer.Option(help="records of each of five kinds")] = 240,
    seed: Annotated[int, typer.Option(help="of the choice")] = 0,
) -> None:
    """Write real text of five kinds: definitions, facts, quotations, manuals, code."""
    from ..studies import write_corpus

    console.say(f"{write_corpus(out, root, each, seed)}")


@app.command()
@reported
def word_order(
    model: Model,
    factors: FactorFolder,
    out: Results,
    file: Annotated[
        Path | None, typer.Option(help="JSON lines: fact, prompt, completion; fact, group, text")
    ] = None,
    reference: Annotated[str, typer.Option(help="group that others are compared with")] = (
        "prompt first"
    ),
    rank: Rank = 32,
    damping: Damping = None,
    dtype: Precision = "float32",
    trust_remote_code: Trust = False,
) -> None:
    """Hold reworded, changed and turned sequences against a question."""
    from rich.table import Table

    from ..studies import word_order as study
    from ..studies.ordering import FILE

    found = _done(
        study, model, factors, dtype, trust_remote_code, out=out, file=file or FILE,
        reference=reference, rank=rank or None, damping=damping,
    )  # fmt: skip
    facts = [*dict.fromkeys(x.fact for x in found.groups)]
    shown = Table("group", *facts, box=None, pad_edge=False)
    for group in dict.fromkeys(x.group for x in found.groups):
        shown.add_row(group, *(f"{found.ratio(fact, group):.3f}" for fact in facts))
    console.say(f"mean influence over that of {reference!r}")
    console.print(shown)


@app.command()
@reported
def layers(
    model: Model,
    factors: FactorFolder,
    data: Data,
    out: Results,
    file: Annotated[
        Path | None, typer.Option(help="JSON lines: name, kind, prompt, completion")
    ] = None,
    top: Annotated[int, typer.Option(help="sequences of a question")] = 50,
    context: Context = None,
    split: SplitBy = "file",
    rank: Rank = 32,
    damping: Damping = None,
    dtype: Precision = "float32",
    trust_remote_code: Trust = False,
) -> None:
    """How deep in the model influence lies, by kinds of questions."""
    from rich.table import Table

    from ..studies import layers as study
    from ..studies.depth import FILE, THIRDS

    found = _done(
        study, model, factors, dtype, trust_remote_code, data=_Corpus(data, context, split),
        out=out, file=file or FILE, top=top, rank=rank or None, damping=damping,
    )  # fmt: skip
    shown = Table("kind", "centre", *THIRDS, "corpus", box=None, pad_edge=False)
    for one in found.kinds:
        cells = (f"{one.overlap[name]:.2f}" for name in (*THIRDS, "corpus"))
        shown.add_row(harmless(one.kind), f"{one.centre:.3f}", *cells)
    console.say("centre of mass (0 lowest, 1 highest layer); token overlap of the best by a third")
    console.print(shown)


@app.command()
@reported
def tail(
    scores: Annotated[Path, typer.Argument(help="folder written by score")],
    data: Data,
    out: Results,
    candidates: Annotated[
        int | None, typer.Option(help="that TF-IDF keeps; default: a tenth of the corpus")
    ] = None,
    largest: Annotated[
        int | None, typer.Option(help="scores in the tail; default 500, at most a tenth")
    ] = None,
    draws: Annotated[int, typer.Option(help="of the Monte-Carlo p-value")] = 1000,
    trust_remote_code: Trust = False,
) -> None:
    """How heavy the tail of influence is, and what a filter by words misses."""
    from rich.table import Table

    from ..report.statistics import PowerLaw
    from ..stages.queries import Queries
    from ..stages.scores import Scores
    from ..studies import tail as study
    from . import runs

    whole("draws", draws)
    names = runs.load_run(scores)["names"]
    _, corpus = runs.scanned(scores, data, console, trust_remote_code)
    opened, questions = Scores(scores), Queries.load(scores)
    runs.check_together(opened, runs.Factors(runs.load_run(scores)["factors"]), questions, corpus)
    texts = [{"input_ids": ids} for ids, _ in questions.examples]
    found = study(opened, texts, corpus, names, out=out, candidates=candidates, largest=largest,
                  draws=draws)  # fmt: skip
    shown = Table("question", "alpha", "p", "top 1 %", "recall", "needed", box=None, pad_edge=False)
    for one in found.questions:
        fit = ("-", "-")
        if isinstance(one.law, PowerLaw):
            fit = (f"{one.law.alpha:.2f}", f"{one.law.p_value:.2f}")
        cells = (f"{one.top_percent:.0%}", f"{one.filtered:.0%}", f"{one.needed:,.0f}")
        shown.add_row(harmless(one.question), *fit, *cells)
    console.say(
        f"recall: of the best 10, by {found.candidates} of {found.sequences} sequences that TF-IDF "
        "keeps; needed: sequences at random until 10 reach the tenth best of those"
    )
    console.print(shown)


@dataclass(frozen=True)
class _Corpus:
    """A corpus that is read when there is a tokenizer."""

    path: Path
    context: int | None
    split: Split

    def read(self, source: "inputs.Source") -> "Tokens":
        from . import inputs

        cutting = inputs.Cutting(source.context(self.context), self.split)
        return inputs.read_data(self.path, source.tokenizer, cutting, console)


def _done(
    study: Any, model: str, factors: Path, dtype: Dtype, trust_remote_code: bool, **settings: Any
) -> Any:
    """A study of a model and its factors, with progress."""
    from ..stages.factors import Factors
    from . import inputs
    from .progress import showing

    source = inputs.load(model, trust_remote_code, dtype)
    settings = {
        name: value.read(source) if isinstance(value, _Corpus) else value
        for name, value in settings.items()
    }
    with showing(console) as progress:
        return study(
            source.model, source.tokenizer, Factors(factors), autocast=source.autocast,
            progress=progress, **settings,
        )  # fmt: skip
