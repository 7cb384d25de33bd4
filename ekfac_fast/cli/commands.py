"""The command line: `ekfac-fast` or `python -m ekfac_fast`.

Commands import what they need when they run: `--help` waits for nothing.
"""

from pathlib import Path
from typing import Annotated

import typer

from ..checks import size, whole
from ..data.choices import Reduce
from ..errors import ArgumentError
from . import studies
from .group import shared
from .options import (
    BatchTokens,
    Beta,
    Blocks,
    Damping,
    Data,
    EigenvalueExamples,
    Eigenvectors,
    FactorFolder,
    KeepCovariances,
    Layers,
    Loading,
    Measure,
    Memory,
    Model,
    Out,
    Precision,
    Reference,
    Refine,
    RefineExamples,
    RefineSeed,
    Shard,
    Task,
    Trust,
    with_loading,
)
from .reported import console, reported

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
app.add_typer(studies.app, name="study")


def _tell_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        console.say(version("ekfac-fast"))
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="print it")
    ] = False,
) -> None:
    """EK-FAC influence functions for language models, fast."""


@app.command()
def doctor() -> None:
    """Print versions, instruction sets, CUDA, threads, and which tier runs each op."""
    from rich.table import Table

    from .. import ops
    from .doctor import environment

    facts = Table(box=None, show_header=False, pad_edge=False)
    for name, value in environment().items():
        facts.add_row(name, value)
    tiers = Table("op", "reference", "cpu", "cuda", box=None, pad_edge=False)
    for stem, has in ops.coverage().items():
        tiers.add_row(stem, *("yes" if has[tier] else "-" for tier in ("reference", "cpu", "cuda")))
    console.print(facts, "", tiers, sep="\n")


@app.command()
@reported
@shared(console)
@with_loading
def fit(
    model: Model,
    data: Data,
    out: Out,
    layers: Layers = None,
    batch_tokens: BatchTokens = None,
    memory: Memory = None,
    blocks: Blocks = 1,
    keep_covariances: KeepCovariances = None,
    eigenvectors: Eigenvectors = "float32",
    max_examples: Annotated[int | None, typer.Option(help="use the first so many")] = None,
    eigenvalue_examples: EigenvalueExamples = None,
    seed: Annotated[int, typer.Option(help="of the sampled labels")] = 0,
    task: Task = None,
    reference: Reference = None,
    beta: Beta = None,
    *,
    loading: Loading,
) -> None:
    """Fit the EK-FAC factors of a model on a corpus."""
    from . import inputs, runs, tasks
    from .loaded import loaded

    asked = tasks.Asked(task or tasks.LANGUAGE, beta, reference=reference)
    source, _, corpus = loaded(model, data, loading, asked, [out])
    runs.fit_job(
        source, corpus, out, console, asked, layers=layers, batch_tokens=batch_tokens,
        memory=memory, blocks=blocks, keep_covariances=keep_covariances,
        eigenvectors=inputs.rounding(eigenvectors), max_examples=max_examples,
        eigenvalue_examples=eigenvalue_examples, seed=seed,
    )  # fmt: skip


@app.command()
@reported
def export(
    factors: FactorFolder,
    out: Annotated[Path, typer.Option(help="folder: factors_NAME in kronfluence's output")],
) -> None:
    """Write factors as kronfluence reads them: all layers' tensors, whole, in fp32."""
    from ..stages.export import export_factors
    from ..stages.factors import Factors

    held = Factors(factors)
    console.say(f"factors of {len(held)} layers in {export_factors(held, out)}")
    if not held.has_covariances:
        console.say("without covariances: they were dropped once they were decomposed")


@app.command()
@reported
@shared(console)
@with_loading
def score(
    model: Model,
    factors: FactorFolder,
    queries: Annotated[
        Path,
        typer.Argument(
            help="JSON lines: prompt, completion (and against); messages; as --task has its data"
        ),
    ],
    data: Data,
    out: Out,
    rank: Annotated[int, typer.Option(help="of a query's gradients; 0: full rank")] = 32,
    damping: Damping = None,
    refine: Refine = None,
    refine_examples: RefineExamples = None,
    refine_seed: RefineSeed = None,
    top_k: Annotated[int | None, typer.Option(help="keep so many a query, no matrix")] = None,
    candidates: Annotated[str | None, typer.Option(help="tfidf:COUNT scans only those")] = None,
    train_size: Annotated[
        int | None, typer.Option(help="N that displayed scores divide by")
    ] = None,
    query_shards: Annotated[
        int, typer.Option(help="so many of torchrun's processes share the queries out")
    ] = 1,
    task: Task = None,
    reference: Reference = None,
    measure: Measure = "loss",
    sets: Annotated[
        str | None,
        typer.Option("--set", help="column of the queries: those alike in it are one query"),
    ] = None,
    reduce: Annotated[Reduce | None, typer.Option(help="of a set: sum (default) or mean")] = None,
    detail: Annotated[
        bool, typer.Option(help="a second pass over the top sequences: layers and tokens")
    ] = True,
    attribution: Annotated[
        bool | None,
        typer.Option(
            "--attribution/--no-attribution",
            help="and output and input tokens of each, a derivative more; default: as --detail",
        ),
    ] = None,
    batch_tokens: BatchTokens = None,
    memory: Memory = None,
    *,
    loading: Loading,
) -> None:
    """Rank the sequences of a corpus by their influence on completions."""
    from ..stages.factors import Factors
    from . import runs, tasks
    from .loaded import loaded

    for name, needless in (
        ("--reduce is for --set", reduce is not None and sets is None),
        ("--refine-seed is for --refine", refine_seed is not None and refine is None),
        ("--attribution is a part of --detail", attribution and not detail),
    ):
        if needless:
            raise ArgumentError(name)
    asked = tasks.fitted(
        task, factors, runs.RUN, loading.adapter, measure=measure, reference=reference
    )
    held = Factors(factors)
    source, cutting, corpus = loaded(model, data, loading, asked, [factors, out])
    questions = tasks.Questions(queries, sets, reduce or "sum", loading.trust_remote_code)
    runs.score_job(
        source, held, questions, corpus, cutting, out, console, asked,
        rank=rank or None, damping=damping, refine=refine, refine_examples=refine_examples,
        refine_seed=refine_seed or 0, top_k=top_k, candidates=candidates, train_size=train_size,
        query_shards=query_shards, batch_tokens=batch_tokens, memory=memory, detail=detail,
        attribution=detail and attribution is not False,
    )  # fmt: skip
    runs.print_top(console, out, corpus, source.tokenizer)


@app.command(name="self")
@reported
@shared(console)
@with_loading
def self_influence(
    model: Model,
    factors: FactorFolder,
    data: Data,
    out: Out,
    damping: Damping = None,
    batch_tokens: BatchTokens = None,
    memory: Memory = None,
    task: Task = None,
    reference: Reference = None,
    *,
    loading: Loading,
) -> None:
    """Rank the sequences of a corpus by their influence on themselves."""
    from ..stages.factors import Factors
    from . import runs, tasks
    from .loaded import loaded

    asked = tasks.fitted(task, factors, runs.RUN, loading.adapter, reference=reference)
    held = Factors(factors)
    source, _, corpus = loaded(model, data, loading, asked, [factors, out])
    scores = runs.self_job(
        source, held, corpus, out, console, task=asked.task(), damping=damping,
        batch_tokens=batch_tokens, memory=memory,
    )  # fmt: skip
    for index, value in scores.top(0, 10):
        console.say(f"{value / scores.train_size:.4f}  {corpus.source(index)}")


@app.command()
@reported
def report(
    scores: Annotated[Path, typer.Argument(help="folder written by score")],
    data: Data,
    out: Annotated[Path, typer.Option(help="HTML file")] = Path("report.html"),
    top: Annotated[int, typer.Option(help="sequences a query")] = 10,
    by: Annotated[str | None, typer.Option(help="column that the page can be filtered by")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write one self-contained HTML file about a scan."""
    from . import runs

    whole("top", top)
    tokenizer, corpus = runs.scanned(scores, data, console, trust_remote_code, [by] if by else ())
    console.say(f"{runs.report_job(scores, corpus, tokenizer, out, top, by=by)}")


@app.command()
@reported
def table(
    scores: Annotated[Path, typer.Argument(help="folder written by score")],
    data: Data,
    out: Annotated[Path, typer.Option(help="parquet file")] = Path("scores.parquet"),
    columns: Annotated[
        list[str] | None, typer.Option(help="of the records, to stand beside the scores")
    ] = None,
    by: Annotated[str | None, typer.Option(help="column whose totals are printed")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write scores as a table; sum them up by data set, say."""
    from . import runs

    keep = [*dict.fromkeys([*(columns or ()), *([by] if by else ())])]
    tokenizer, corpus = runs.scanned(scores, data, console, trust_remote_code, keep)
    runs.table_job(scores, corpus, tokenizer, out, console, columns=keep, by=by)


@app.command()
@reported
def validate(
    bank: Annotated[Path, typer.Argument(help="folder written by ekfac_fast.validation.retrain")],
    scores: Annotated[
        list[Path], typer.Argument(help="folders of scores, .npy [Q,N], kronfluence's .safetensors")
    ],
    draws: Annotated[int, typer.Option(help="of the bootstrap")] = 1000,
    seed: Annotated[int, typer.Option(help="of the bootstrap")] = 0,
) -> None:
    """Hold scores against models that were trained again: the linear datamodeling score."""
    from . import runs

    runs.validate_job(bank, scores, console, draws=draws, seed=seed)


@app.command()
@reported
def plan(
    model: Model,
    sequences: Annotated[int, typer.Option(help="in the corpus")],
    tokens: Annotated[int, typer.Option(help="a sequence")] = 512,
    fit_sequences: Annotated[int | None, typer.Option(help="to fit on; default: all")] = None,
    queries: Annotated[int, typer.Option(help="scored in one pass")] = 8,
    rank: Annotated[int, typer.Option(help="0: full rank")] = 32,
    layers: Layers = None,
    blocks: Blocks = 1,
    keep_covariances: KeepCovariances = None,
    eigenvectors: Eigenvectors = "float32",
    eigenvalue_examples: EigenvalueExamples = None,
    memory: Memory = None,
    processes: Annotated[int, typer.Option(help="that share the run")] = 1,
    shard: Shard = False,
    dtype: Precision = "float32",
    rate: Annotated[
        float | None, typer.Option(help="TFLOP/s of each process; default: measured here")
    ] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Print what a run would cost, from shapes alone: no weights are loaded."""
    import torch

    from ..model.layers import parameter_counts, select_layers
    from ..model.weights import usual_device
    from ..stages import plan as planning
    from ..stages.budget import head_size, token_width
    from . import inputs, plans

    shape = inputs.shape(model, trust_remote_code)
    selected = select_layers(shape, layers)
    tracked, parameters = parameter_counts(shape, selected)
    costs = planning.plan(
        selected, parameters=parameters, sequences=sequences, tokens=tokens,
        fit_sequences=sequences if fit_sequences is None else fit_sequences, queries=queries,
        rank=rank or None, blocks=blocks, keep_covariances=keep_covariances,
        eigenvectors=inputs.rounding(eigenvectors), eigenvalue_examples=eigenvalue_examples,
        width=token_width(shape), head=head_size(shape), processes=processes,
        memory=None if memory is None else size("memory", memory),
        rate=None if rate is None else rate * 1e12, sharded=shard,
        dtype=inputs.autocast(dtype, usual_device()) or torch.float32,
    )  # fmt: skip
    plans.show(costs, console, tracked, parameters, processes, rate is None)


@app.command()
@reported
def demo(
    model: Annotated[
        str, typer.Option(help="small: trained here; smollm2: of a package; or a .gguf file")
    ] = "small",
    folder: Annotated[
        Path | None, typer.Option(help="everything is made here; default demo, or demo-smollm2")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="of training; default 1000")] = None,
    topics: Annotated[int | None, typer.Option(help="use so many of them; default: all")] = None,
) -> None:
    """Train a small GPT-2 on Python's reference, or take a pretrained model, and ask it where its
    answers come from.
    """
    for name, count in (("steps", steps), ("topics", topics)):
        if count is not None:
            whole(name, count)
            if model != "small":
                raise ArgumentError(f"--{name} is for the model that is trained here")
    from . import demo_pretrained, demo_small
    from .demo import run

    if model == "small":
        chosen = demo_small.small(steps or demo_small.STEPS, topics)
    else:
        chosen = demo_pretrained.pretrained(model)
    run(folder or Path("demo" if model == "small" else f"demo-{Path(model).stem}"), chosen, console)
