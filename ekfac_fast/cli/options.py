"""What the commands can be told."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..data import choices
from ..data.choices import OnLong, Split

Dtype = Literal["auto", "float32", "bfloat16"]
Kind = Literal["language-model", "sequence-classification", "token-classification", "reward", "dpo"]
Stored = Literal["float32", "bfloat16"]

Model = Annotated[str, typer.Argument(help="Hugging Face model folder or name, or a .gguf file")]
Data = Annotated[
    Path,
    typer.Argument(
        help=".jsonl, .json, .txt, .csv, .parquet or .arrow, a folder of them, or as datasets "
        "saves; tokens: .bin, or a column input_ids"
    ),
]
Out = Annotated[Path, typer.Option(help="folder of the results; a run that was killed continues")]
FactorFolder = Annotated[Path, typer.Argument(help="folder written by fit (or by kronfluence)")]
Adapter = Annotated[str | None, typer.Option(help="peft adapter to put in: a folder or name")]
Context = Annotated[int | None, typer.Option(help="tokens a sequence, at most; default 512")]
SplitBy = Annotated[Split, typer.Option(help="a .txt record is a: file, paragraph or line")]
TooLong = Annotated[OnLong, typer.Option(help="what becomes of a record over the context")]
Packed = Annotated[
    bool, typer.Option("--packed", help="records end to end in a sequence, kept apart by positions")
]
Fields = Annotated[
    str | None,
    typer.Option(help="of the corpus: prompt=question,completion=answer; user=a+b,assistant=c"),
]
ChatTemplate = Annotated[
    Path | None, typer.Option(help="file; for messages, in place of the tokenizer's")
]
Layers = Annotated[
    list[str] | None,
    typer.Option(help="layer names or globs, :diagonal behind them; default: MLPs"),
]
Blocks = Annotated[
    int, typer.Option(help="diagonal blocks of each covariance: cheaper, approximate")
]
KeepCovariances = Annotated[
    bool | None,
    typer.Option(
        "--keep-covariances/--no-keep-covariances",
        help="once they are decomposed; default: below 1 GiB",
    ),
]
Eigenvectors = Annotated[Stored, typer.Option(help="as they are stored; bfloat16: half the disk")]
EigenvalueExamples = Annotated[
    int | None, typer.Option(help="to correct the eigenvalues on, evenly spaced; default: all")
]
BatchTokens = Annotated[
    int | None, typer.Option(help="tokens a batch; default 4096, on a CPU 1024")
]
Memory = Annotated[str | None, typer.Option(help="to keep to, e.g. 16GiB; default: what is free")]
DeviceMap = Annotated[
    str | None, typer.Option(help="auto: modules over all GPUs, then memory, as accelerate does")
]
Shard = Annotated[bool, typer.Option(help="weights over all processes of torchrun")]
Damping = Annotated[
    str | None,
    typer.Option(help="of each layer's mean eigenvalue, like 0.01x (default 0.1x); or absolute"),
]
Refine = Annotated[str | None, typer.Option(help="queries further: cg:10, lissa:5000, astra:300")]
RefineExamples = Annotated[
    int | None, typer.Option(help="of the corpus, for --refine; default 256")
]
RefineSeed = Annotated[int | None, typer.Option(help="of their choice; default 0")]
Task = Annotated[
    Kind | None,
    typer.Option(help="what the model does; default language-model, or as was fitted"),
]
Measure = Annotated[choices.Measure, typer.Option(help="of a query's label or pair, for --task")]
Reference = Annotated[
    str | None,
    typer.Option(help="of --task dpo: the model before; default: without its adapter"),
]
Beta = Annotated[float | None, typer.Option(help="of --task dpo; default 0.1")]
Trust = Annotated[bool, typer.Option(help="run code that comes with the model")]
Precision = Annotated[
    Dtype, typer.Option(help="of the model's passes; auto: bfloat16 where it is fast")
]


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a model is loaded and a corpus is cut for it: options of every command on both."""

    context: Context = None
    split: SplitBy = "file"
    on_long: TooLong = "chunk"
    packed: Packed = False
    adapter: Adapter = None
    fields: Fields = None
    chat_template: ChatTemplate = None
    shard: Shard = False
    device_map: DeviceMap = None
    dtype: Precision = "float32"
    trust_remote_code: Trust = False


def with_loading(command: Callable[..., None]) -> Callable[..., None]:
    """A command of a keyword `loading` with the options of `Loading` in its place."""
    own = signature(command).parameters
    theirs = signature(Loading).parameters

    @wraps(command)
    def run(**given: Any) -> None:
        loading = Loading(**{name: given.pop(name) for name in theirs})
        command(loading=loading, **given)

    every = [x.replace(kind=Parameter.KEYWORD_ONLY) for x in (*own.values(), *theirs.values())]
    every = [x for x in every if x.name != "loading"]
    run.__signature__ = signature(command).replace(parameters=every)  # type: ignore[attr-defined]
    run.__annotations__ = {x.name: x.annotation for x in every} | {"return": None}
    return run
