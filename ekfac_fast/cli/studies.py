"""`ekfac-fast study`: the paper's experiments on any model."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Damping, Dtype, FactorFolder, Model, Precision, Trust
from .reported import console, reported

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


def _done(
    study: Any, model: str, factors: Path, dtype: Dtype, trust_remote_code: bool, **settings: Any
) -> Any:
    """A study of a model and its factors, with progress."""
    from ..stages.factors import Factors
    from . import inputs
    from .progress import showing

    source = inputs.load(model, trust_remote_code, dtype)
    with showing(console) as progress:
        return study(
            source.model, source.tokenizer, Factors(factors), autocast=source.autocast,
            progress=progress, **settings,
        )  # fmt: skip
