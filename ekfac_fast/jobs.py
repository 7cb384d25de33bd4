"""What the commands do: files in, files out, progress shown; public API put together."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from . import report
from .analysis import Stage
from .data import OnLong, Tokens, read_queries, tokenize
from .factors import Factors, fit
from .files import load_json, save_json
from .queries import Queries, prepare_queries
from .records import Split, optional, read
from .results import collect, facts
from .scores import Scores
from .scoring import score, self_scores

RUN = "run.json"
CONTEXT = 512
DAMPING_RULE = "0.1 x the mean eigenvalue of each layer"


@dataclass(frozen=True)
class Cutting:
    """How text becomes sequences: of at most `context` tokens, from records that `split` makes of
    a text file; longer ones are cut in chunks, truncated or refused.
    """

    context: int
    split: Split = "file"
    on_long: OnLong = "chunk"


@dataclass(frozen=True)
class Source:
    """A model folder or name, and its tokenizer."""

    path: str
    model: nn.Module
    tokenizer: Any

    def context(self, wanted: int | None) -> int:
        """Tokens a sequence: as wanted (512), but no more than the model has positions for."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        return min(wanted or CONTEXT, positions or CONTEXT)


def load(path: str, trust_remote_code: bool, device: str | None = None) -> Source:
    """A Hugging Face causal language model in evaluation mode, on a GPU if there is one."""
    transformers = optional("transformers", "hf")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, trust_remote_code=trust_remote_code
    )
    return Source(path, model.to(device).eval(), load_tokenizer(path, trust_remote_code))


def load_tokenizer(path: str, trust_remote_code: bool) -> Any:
    """The tokenizer beside a model."""
    transformers = optional("transformers", "hf")
    return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def read_data(path: Path, tokenizer: Any, cutting: Cutting, console: Console) -> Tokens:
    """A corpus as examples; says what was cut off or left out."""
    records = read(path, split=cutting.split)
    data = tokenize(records, tokenizer, cutting.context, on_long=cutting.on_long, on_empty="skip")
    notes = [f"{len(data)} sequences of at most {cutting.context} tokens"]
    if data.truncated:
        notes.append(f"{data.truncated} records lost {data.dropped} tokens")
    if data.skipped:
        notes.append(f"{data.skipped} empty records skipped")
    console.print(f"{path}: {'; '.join(notes)}")
    return data


@contextmanager
def showing(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A progress callback with one bar a stage: done, rate and time left."""
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, tuple[int, float, int]] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, rate=""), time.perf_counter(), done
            task, start, first = tasks[stage]
            elapsed = time.perf_counter() - start
            per_token = stage in ("covariance", "eigenvalue", "scan")
            rate = (
                f"{(done - first) / elapsed:,.0f} tokens/s" if elapsed > 0.2 and per_token else ""
            )
            bars.update(task, completed=done, total=total, rate=rate)

        yield update


def fit_job(source: Source, data: Tokens, out: Path, console: Console, **settings: Any) -> Factors:
    """`fit` with progress, its time kept in `out/run.json`."""
    start = time.perf_counter()
    with showing(console) as progress:
        factors = fit(source.model, data, out=out, progress=progress, **settings)
    if not (out / RUN).exists():
        save_json(out / RUN, {"seconds": time.perf_counter() - start, "model": source.path})
    console.print(
        f"factors of {len(factors)} layers from {factors.sequences} sequences, "
        f"{factors.tokens} tokens, in {out}"
    )
    return factors


def score_job(
    source: Source,
    factors: Factors,
    queries: Path,
    data: Tokens,
    cutting: Cutting,
    out: Path,
    console: Console,
    *,
    rank: int | None,
    damping: float | None,
    **settings: Any,
) -> Scores:
    """Queries prepared, the corpus scanned, everything that `report_job` needs kept in `out`."""
    asked = read_queries(queries, source.tokenizer, cutting.context)
    start = time.perf_counter()
    with showing(console) as progress:
        prepared = prepare_queries(
            source.model, factors, asked, rank=rank, damping=damping, progress=progress
        )
        seconds = time.perf_counter() - start
        scores = score(
            source.model, prepared, data, out=out, per_token=True, progress=progress, **settings
        )
    prepared.save(out)
    fitted = factors.folder / RUN
    run = {
        "model": source.path,
        "factors": str(factors.folder),
        "cutting": asdict(cutting),
        "names": [_name(asked.records[i], i) for i in range(len(asked))],
        "damping_rule": DAMPING_RULE if damping is None else "the same in every layer, as given",
        "stages": [
            *([["fit the factors", load_json(fitted)["seconds"]]] if fitted.exists() else []),
            ["prepare the queries", seconds],
            ["scan the corpus", scores.seconds],
        ],
    }
    save_json(out / RUN, run)
    return scores


def self_job(
    source: Source, factors: Factors, data: Tokens, out: Path, console: Console, **settings
):
    """`self_scores` with progress."""
    with showing(console) as progress:
        return self_scores(source.model, factors, data, out=out, progress=progress, **settings)


def report_job(
    folder: Path, data: Tokens, tokenizer: Any, out: Path, k: int,
    floor: float | None = None, notes: Sequence[str] = (),
) -> Path:  # fmt: skip
    """The HTML report of a folder that `score_job` wrote."""
    run, scores, queries = load_json(folder / RUN), Scores(folder), Queries.load(folder)
    results = collect(scores, queries, data, tokenizer, run["names"], k)
    stages = [
        Stage(name, seconds, floor if name == "scan the corpus" else None)
        for name, seconds in run["stages"]
    ]
    settings = [*((name, str(value)) for name, value in run["cutting"].items())]
    settings.append(("factors", run["factors"]))
    about = facts(
        scores, Factors(run["factors"]), queries, run["model"], run["damping_rule"], stages,
        settings, notes,
    )  # fmt: skip
    return report.write(out, about, results)


def print_top(
    console: Console, folder: Path, data: Tokens, tokenizer: Any, k: int = 3, width: int = 70
) -> None:
    """The first k sequences of every query, in the terminal."""
    run, scores, queries = load_json(folder / RUN), Scores(folder), Queries.load(folder)
    for q, name in enumerate(run["names"]):
        ids, labels = queries.examples[q]
        prompt = tokenizer.decode(ids[labels < 0])
        completion = tokenizer.decode(ids[labels >= 0])
        console.print(f"\n{name}: {prompt}", end="", style="bold", markup=False)
        console.print(completion, style="bold green", markup=False)
        console.print(f"  log p = {-float(queries.measurements[q]):.2f}", style="dim")
        for place, (index, value) in enumerate(scores.top(q, k), 1):
            text = " ".join(tokenizer.decode(data[index]["input_ids"]).split())
            console.print(
                f"  {place}. {value / scores.train_size:+.4f}  {Path(data.source(index)).name}"
            )
            console.print(f"     {text[:width]}...", style="dim", markup=False)


def _name(record: Any, index: int) -> str:
    return str(record.get("name") or f"query {index + 1}")
