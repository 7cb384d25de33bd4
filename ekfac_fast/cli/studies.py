"""`ekfac-fast study`: the paper's experiments on any model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..checks import whole
from ..data.choices import Split
from ..errors import ArgumentError
from .options import (
    Context,
    Damping,
    Data,
    Dtype,
    FactorFolder,
    Layers,
    Model,
    Precision,
    SplitBy,
    Trust,
)
from .reported import console, reported
from .terminal import harmless

if TYPE_CHECKING:
    from ..data.examples import Corpus
    from ..studies.sizes import Scan
    from . import inputs

app = typer.Typer(no_args_is_help=True, help="The paper's experiments on any model.")

Results = Annotated[Path, typer.Option(help="folder of the results: JSON lines and a drawing")]
Rank = Annotated[int, typer.Option(help="of a question's gradients; 0: full rank")]

Largest = Annotated[int | None, typer.Option(help="scores in a tail; default 500, at most a tenth")]
Draws = Annotated[int, typer.Option(help="of the Monte-Carlo p-value")]


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
    before: Annotated[
        str, typer.Option(help="put before every sequence: nothing predicts a text's first token")
    ] = "",
    rank: Rank = 32,
    damping: Damping = None,
    dtype: Precision = "float32",
    trust_remote_code: Trust = False,
) -> None:
    """Hold reworded, changed and turned sequences against a question."""
    from ..studies import word_order as study
    from ..studies.ordering import FILE

    found = _done(
        study, model, factors, dtype, trust_remote_code, out=out, file=file or FILE,
        reference=reference, before=before, rank=rank or None, damping=damping,
    )  # fmt: skip
    facts = [*dict.fromkeys(x.fact for x in found.groups)]
    console.say(f"mean influence over that of {reference!r}")
    groups = dict.fromkeys(x.group for x in found.groups)
    rows = [[group, *(f"{found.ratio(fact, group):.3f}" for fact in facts)] for group in groups]
    _print(["group", *facts], rows)


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
    from ..studies import layers as study
    from ..studies.depth import FILE, THIRDS

    found = _done(
        study, model, factors, dtype, trust_remote_code, data=_Corpus(data, context, split),
        out=out, file=file or FILE, top=top, rank=rank or None, damping=damping,
    )  # fmt: skip
    columns = (*THIRDS, "all", "corpus")
    rows = [
        [one.kind, f"{one.centre:.3f}", *(f"{one.overlap[name]:.2f}" for name in columns)]
        for one in found.kinds
    ]
    console.say("centre of mass (0 lowest, 1 highest layer); token overlap of the best by layers")
    _print(["kind", "centre", *columns], rows)


@app.command()
@reported
def tail(
    scores: Annotated[Path, typer.Argument(help="folder written by score")],
    data: Data,
    out: Results,
    candidates: Annotated[
        int | None, typer.Option(help="that TF-IDF keeps; default: a tenth of the corpus")
    ] = None,
    largest: Largest = None,
    draws: Draws = 1000,
    trust_remote_code: Trust = False,
) -> None:
    """How heavy the tail of influence is, and what a filter by words misses."""
    from ..report.statistics import PowerLaw
    from ..studies import tail as study

    whole("draws", draws)
    scan, names = _scanned(scores, data, trust_remote_code)
    found = study(
        scan.matrix, scan.questions, scan.data, names, out=out, candidates=candidates,
        largest=largest, draws=draws,
    )  # fmt: skip
    rows = []
    for one in found.questions:
        law = one.law
        fit = [f"{law.alpha:.2f}", f"{law.p_value:.2f}"] if isinstance(law, PowerLaw) else ["-"] * 2
        cells = [f"{one.top_percent:.0%}", f"{one.filtered:.0%}", f"{one.needed:,.0f}"]
        rows.append([one.question, *fit, *cells])
    console.say(
        f"recall: of the best 10, by {found.candidates} of {found.sequences} sequences that TF-IDF "
        "keeps; needed: sequences at random until 10 reach the tenth best of those"
    )
    _print(["question", "alpha", "p", "top 1 %", "recall", "needed"], rows)


@app.command()
@reported
def memorisation(
    model: Model,
    factors: FactorFolder,
    data: Data,
    out: Results,
    file: Annotated[
        Path | None, typer.Option(help="JSON lines: name, prompt, completion, text")
    ] = None,
    context: Context = None,
    split: SplitBy = "file",
    rank: Rank = 32,
    damping: Damping = None,
    dtype: Precision = "float32",
    trust_remote_code: Trust = False,
) -> None:
    """Where famous passages stand among a corpus, each for its own completion."""
    from ..studies import memorisation as study
    from ..studies.recall import FILE

    found = _done(
        study, model, factors, dtype, trust_remote_code, data=_Corpus(data, context, split),
        out=out, file=file or FILE, rank=rank or None, damping=damping,
    )  # fmt: skip
    rows = [
        [x.passage, f"{x.log_p:.2f}", f"{x.rank} of {x.sequences}", f"{x.holding}"]
        for x in found.passages
    ]
    _print(["passage", "log p a token", "rank", "sequences that hold it, too"], rows)


@app.command()
@reported
def planted(
    model: Model,
    data: Data,
    out: Results,
    copies: Annotated[str, typer.Option(help="how often each invented sentence is planted")] = (
        "1,2,5,10,20,50"
    ),
    examples: Annotated[int, typer.Option(help="of the corpus, to plant them among")] = 100,
    epochs: Annotated[int, typer.Option(help="of fine-tuning")] = 3,
    rate: Annotated[float, typer.Option(help="of learning")] = 1e-4,
    layers: Layers = None,
    context: Context = None,
    split: SplitBy = "file",
    rank: Rank = 32,
    damping: Damping = None,
    trust_remote_code: Trust = False,
) -> None:
    """Fine-tune on invented sentences, and ask how much of the influence their copies hold."""
    from ..studies import planted as study
    from . import inputs
    from .progress import showing

    counts = _counts(copies)
    source = inputs.load(model, trust_remote_code)
    with showing(console) as progress:
        found = study(
            source.model, source.tokenizer, _Corpus(data, context, split).read(source), out=out,
            copies=counts, examples=examples, epochs=epochs, rate=rate, layers=layers,
            rank=rank or None, damping=damping, progress=progress,
        )  # fmt: skip
    rows = [
        [str(x.copies), f"{x.before:.2f}", f"{x.after:.2f}", f"{x.share:.1%}", f"{x.ahead}"]
        for x in found.sentences
    ]
    _print(["copies", "log p a token before", "after", "share", "sequences ahead"], rows)


@app.command()
@reported
def languages(
    model: Model,
    factors: FactorFolder,
    out: Results,
    file: Annotated[
        Path | None,
        typer.Option(help="JSON lines: topic, language, prompt, completion; topic, language, text"),
    ] = None,
    rank: Rank = 32,
    damping: Damping = None,
    dtype: Precision = "float32",
    trust_remote_code: Trust = False,
) -> None:
    """Whether a text in one language teaches what is asked in another."""
    from ..studies import languages as study
    from ..studies.parallel import FILE

    found = _done(
        study, model, factors, dtype, trust_remote_code, out=out, file=file or FILE,
        rank=rank or None, damping=damping,
    )  # fmt: skip
    rows = [
        [one, f"{found.across(one):.3f}", f"{found.across(one, other=True):.3f}",
         f"{found.broken[one]:.0%}", f"{found.log_p[one]:.1f}"]
        for one in found.languages
    ]  # fmt: skip
    heads = ["language", "across / same", "on other topics", "unknown or broken tokens", "log p"]
    _print(heads, rows)


@app.command()
@reported
def scale(
    scores: Annotated[list[Path], typer.Argument(help="folders written by score, a model each")],
    data: Annotated[Path, typer.Option(help="that was scanned")],
    out: Results,
    trust_remote_code: Trust = False,
) -> None:
    """Whether larger models share fewer words with what influences them."""
    from ..studies import scale as study

    scans = [_scanned(folder, data, trust_remote_code) for folder in scores]
    found = study([scan for scan, _ in scans], scans[0][1], out=out)
    rows = [
        [x.model, f"{x.parameters / 1e6:.1f}M", f"{x.top:.3f}", f"{x.corpus:.3f}"]
        for x in found.models
    ]
    _print(["model", "parameters", "overlap of the top 10", "of the corpus"], rows)


@app.command(name="all")
@reported
def all_studies(
    model: Model,
    factors: FactorFolder,
    data: Data,
    out: Results,
    top: Annotated[int, typer.Option(help="sequences of a question")] = 50,
    largest: Largest = None,
    draws: Draws = 1000,
    context: Context = None,
    split: SplitBy = "file",
    rank: Rank = 32,
    damping: Damping = None,
    dtype: Precision = "float32",
    trust_remote_code: Trust = False,
) -> None:
    """Every study with the texts that ship; the corpus is scanned once."""
    from ..studies import all_studies as study

    found = _done(
        study, model, factors, dtype, trust_remote_code, data=_Corpus(data, context, split),
        out=out, top=top, largest=largest, draws=whole("draws", draws), rank=rank or None,
        damping=damping,
    )  # fmt: skip
    for name in found:
        console.say(f"{out / name / name}.jsonl, {name}.svg")


def _counts(words: str) -> list[int]:
    """1,2,5 as numbers."""
    try:
        return [int(word) for word in words.split(",")]
    except ValueError as error:
        raise ArgumentError(f"--copies is {words!r}, expected numbers like 1,2,5") from error


def _print(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    shown = Table(*map(harmless, columns), box=None, pad_edge=False)
    for row in rows:
        shown.add_row(*(Text(harmless(cell)) for cell in row))
    console.print(shown)


def _scanned(scores: Path, data: Path, trust_remote_code: bool) -> tuple["Scan", list[str]]:
    """What `score` left in a folder, and the questions' names."""
    from ..stages.factors import Factors
    from ..stages.queries import Queries
    from ..stages.scores import Scores
    from ..studies.sizes import Scan
    from . import inputs, runs

    run = runs.load_run(scores)
    tokenizer, corpus = runs.scanned(scores, data, console, trust_remote_code)
    opened, queries = Scores(scores), Queries.load(scores)
    runs.check_together(opened, Factors(run["factors"]), queries, corpus, tokenizer)
    shape = inputs.shape(run["model"], trust_remote_code)
    parameters = sum(x.numel() for x in shape.parameters())
    asked = [{"input_ids": ids} for ids, _ in queries.examples]
    return Scan(run["model"], parameters, opened.matrix, asked, corpus), run["names"]


@dataclass(frozen=True)
class _Corpus:
    """A corpus that is read when there is a tokenizer."""

    path: Path
    context: int | None
    split: Split

    def read(self, source: "inputs.Source") -> "Corpus":
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
    if "data" in settings:
        settings["data"] = settings["data"].read(source)
    with showing(console) as progress:
        return study(
            source.model, source.tokenizer, Factors(factors), autocast=source.autocast,
            progress=progress, **settings,
        )  # fmt: skip
