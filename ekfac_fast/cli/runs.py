"""What the commands do: files in, files out, progress shown; public API put together."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from .. import report
from ..checks import Whole, check_json
from ..data.examples import Corpus
from ..errors import StoreError
from ..model.layers import Layer, parameter_counts, select_layers
from ..report.collect import check_together, collect, label_of, passages, run_facts, stage_times
from ..report.contents import StageTime, beyond
from ..report.text import amount
from ..stages.damping import damping_rule
from ..stages.factors import Factors
from ..stages.fit import fit
from ..stages.preparation import members_of, prepare_queries
from ..stages.processes import Processes
from ..stages.queries import Queries
from ..stages.run import RunArguments, Stage
from ..stages.scan import score, self_scores
from ..stages.scores import UNFINISHED, Scores
from ..stages.trust import approximations, note_validation
from ..store.files import load_json, save_json
from ..store.folder import Store
from ..store.manifest import MANIFEST
from ..validation import RetrainingBank, reliability, validate
from .inputs import Cutting, Source, load_tokenizer, read_data
from .progress import showing
from .tasks import Asked, Questions, read_asked
from .terminal import Terminal, harmless

RUN, QUERIES = "run.json", "queries"
ASKED = Asked()
SCHEMA = {
    "model": str, "factors": str, "cutting": {"context": Whole(2)}, "names": [str],
    "damping_rule": str,
}  # fmt: skip


def fit_job(
    source: Source,
    data: Corpus,
    out: Path,
    console: Terminal,
    asked: Asked = ASKED,
    *,
    seed: int = 0,
    **settings: Any,
) -> Factors:
    """`fit` with progress; `out/run.json` says which model, and for which task."""
    layers = select_layers(source.model, settings.get("layers"))
    console.say(covered(layers, *parameter_counts(source.model, layers)))
    with showing(console) as progress:
        factors = fit(
            source.model, data, out=out, autocast=source.autocast, progress=progress,
            task=asked.task(seed), **settings,
        )  # fmt: skip
    if Processes.here().first and not (out / RUN).exists():
        save_json(out / RUN, {"model": source.path, "adapter": source.adapter, **asked.told})
    console.say(
        f"factors of {len(factors)} layers from {factors.sequences} sequences, "
        f"{factors.tokens} tokens, in {out}",
    )
    widest = max((x for x in layers if x.expert is None), key=lambda x: x.J, default=None)
    if widest is not None and factors.tokens < widest.J:
        console.say(
            f"note: {factors.tokens} tokens are fewer than the {widest.J} inputs of {widest.name}: "
            "most of its curvature is unknown, and scores are hardly more than dot products. Fit "
            "on more",
            style="yellow",
        )
    if not factors.has_covariances:
        console.say("covariances were dropped once they were decomposed")
    _tell_basis(factors, console)
    return factors


def _tell_basis(factors: Factors, console: Terminal) -> None:
    for said in approximations(
        factors.blocks, len(factors.diagonal), factors.eigenvectors, factors.sample
    ):
        console.say(said)


def covered(layers: Sequence[Layer], tracked: int, parameters: int) -> str:
    """What is chosen of a model, in a line."""
    return (
        f"{len(layers)} layers, {layers[0].name} to {layers[-1].name}: {amount(tracked)} "
        f"parameters, {tracked / parameters:.0%} of the model's"
    )


def score_job(
    source: Source,
    factors: Factors,
    queries: Path | Questions,
    data: Corpus,
    cutting: Cutting,
    out: Path,
    console: Terminal,
    asked: Asked = ASKED,
    *,
    rank: int | None,
    damping: float | str | None,
    refine: str | None = None,
    refine_examples: int | None = None,
    refine_seed: int = 0,
    batch_tokens: int | None = None,
    memory: str | None = None,
    detail: bool = True,
    attribution: bool = True,
    **settings: Any,
) -> Scores:
    """Queries prepared, the corpus scanned, everything that `report_job` needs kept in `out`."""
    if isinstance(queries, Path):
        queries = Questions(queries)
    found, measuring = read_asked(asked, queries, source, cutting, [out], console)
    sets = None if queries.sets is None else found.column(queries.sets)
    _tell_basis(factors, console)
    with showing(console) as progress:
        passes: RunArguments = {
            "batch_tokens": batch_tokens,
            "memory": memory,
            "autocast": source.autocast,
            "progress": progress,
        }
        prepared = prepare_queries(
            source.model, factors, found, rank=rank, damping=damping, refine=refine,
            dataset=None if refine is None else data, refine_examples=refine_examples,
            refine_seed=refine_seed, out=out / QUERIES, sets=sets, reduce=queries.reduce,
            **(passes | {"task": measuring}),
        )  # fmt: skip
        begun = Store.load(out / QUERIES)
        with begun.threads():
            scores = score(
                source.model, prepared, data, out=out, per_token=detail, attribution=attribution,
                **(passes | {"task": asked.task()}), **settings,
            )  # fmt: skip
    names = _names(found, sets)
    if prepared.refinement is not None:
        console.say(prepared.refinement.title)
        for q, name in enumerate(names):
            console.say(f"  {name}: {prepared.refinement.told(q)}")
    if factors.facts is not None and factors.facts["data"] != scores.store.facts["data"]:
        console.say(
            f"note: the factors are from {factors.sequences:,} sequences and not from the "
            f"{len(scores):,} that were scored: one that they do not know may score too high",
            style="yellow",
        )
    seconds = factors.seconds | begun.state["seconds"] | scores.stages
    run = {
        "model": source.path,
        "adapter": source.adapter,
        "factors": str(factors.folder),
        "at": str(Path.cwd()),
        "cutting": asdict(cutting),
        "names": names,
        "measured": asked.measured(found, measuring, None if sets is None else queries.reduce),
        "damping_rule": damping_rule(damping),
        "seconds": {stage: seconds[stage] for stage in Stage if stage in seconds},
    }
    processes = Processes.here()
    if processes.first:
        prepared.save(out)
        save_json(out / RUN, run)
    processes.meet()
    return scores


def self_job(
    source: Source, factors: Factors, data: Corpus, out: Path, console: Terminal, **settings: Any
) -> Scores:
    """`self_scores` with progress."""
    _tell_basis(factors, console)
    with showing(console) as progress:
        return self_scores(
            source.model, factors, data, out=out, autocast=source.autocast, progress=progress,
            **settings,
        )  # fmt: skip


def load_run(folder: Path) -> dict[str, Any]:
    """What `score_job` noted in a folder.

    Raises:
        StoreError: something is missing from it.
    """
    store = Store.load(folder)
    if not (folder / RUN).exists():
        if "train_size" in store.facts and not store.finished:
            raise StoreError(f"{folder}: {UNFINISHED}; run it again to continue")
        raise StoreError(
            f"{folder} has scores, but not what a report or a table is made of: they are of the "
            "Python API, or of `self`. Score with the command, or use Scores.to_pandas and top"
        )
    run = load_json(folder / RUN, ours=store.checked)
    check_json(run, SCHEMA, folder / RUN, "Score again")
    if "seconds" in run:
        check_json(run["seconds"], {str: float}, folder / RUN, "Score again")
    at = Path(run.get("at", Path.cwd()))
    if at != Path.cwd():
        # As it was typed, from where it was typed.
        for name in ("model", "factors", "adapter"):
            if run.get(name) is not None and (there := at / run[name]).exists():
                run[name] = str(there)
    return run


def _factors_of(folder: Path, run: Mapping[str, Any]) -> Factors:
    """Those that a folder's run names; StoreError where they have gone."""
    if not (there := Path(run["factors"])).exists():
        raise StoreError(
            f"{folder / RUN} names the factors {there} (typed in {run.get('at', 'another folder')})"
            ", and they are not there: put them back, or link to where they are now"
        )
    return Factors(there)


def scanned(
    folder: Path,
    data: Path,
    console: Terminal,
    trust_remote_code: bool,
    keep: Sequence[str] = (),
) -> tuple[Any, Corpus]:
    """The tokenizer and the corpus of a folder that `score_job` wrote, cut as for the scan."""
    run = load_run(folder)
    cutting = Cutting(**run["cutting"])
    tokenizer = load_tokenizer(run["model"], trust_remote_code, cutting.chat_template)
    return tokenizer, read_data(data, tokenizer, cutting, console, keep)


def report_job(
    folder: Path,
    data: Corpus,
    tokenizer: Any,
    out: Path,
    k: int,
    floor: float | None = None,
    notes: Sequence[str] = (),
    by: str | None = None,
) -> Path:
    """The HTML report of a folder that `score_job` wrote."""
    run, scores, queries = load_run(folder), Scores(folder), Queries.load(folder)
    factors = _factors_of(folder, run)
    check_together(scores, factors, queries, data, tokenizer)
    measured = run.get("measured", "log p")
    results = collect(
        scores, queries, data, tokenizer, run["names"], k, by,
        measured="" if measured == "log p" else measured,
    )  # fmt: skip
    times = stage_times(run.get("seconds", {}), floor)
    # Older versions kept names and seconds.
    times += [StageTime(name, seconds) for name, seconds in run.get("stages", ())]
    settings = [
        (name, "given" if name in ("chat_template", "labels") else str(value))
        for name, value in run["cutting"].items()
        if value is not None
    ]
    if run.get("adapter") is not None:
        settings.append(("adapter", str(run["adapter"])))
    settings.append(("factors", run["factors"]))
    if queries.refinement is not None:
        settings.append(("queries refined", queries.refinement.title))
    about = run_facts(
        scores,
        factors,
        queries,
        run["model"],
        run["damping_rule"],
        times,
        settings,
        notes,
        by,
    )
    return report.write(out, about, results)


def table_job(
    folder: Path,
    data: Corpus,
    tokenizer: Any,
    out: Path,
    console: Terminal,
    *,
    columns: Sequence[str],
    by: str | None,
) -> None:
    """Scores of a folder that `score_job` wrote as a parquet file; totals by a column."""
    run, scores, queries = load_run(folder), Scores(folder), Queries.load(folder)
    check_together(scores, _factors_of(folder, run), queries, data, tokenizer)
    names = [f"{q} {name}" if run["names"].count(name) > 1 else name for q, name in
             enumerate(run["names"])]  # fmt: skip
    console.say(f"{scores.to_parquet(out, data, names=names, columns=columns)}")
    if by is None:
        return
    labels = data.column(by)
    shown = Table(by, "sequences", *map(harmless, names), box=None, pad_edge=False)
    found, counts = scores.totals(labels), Counter(labels)
    for label, sums in found.items():
        values = (f"{value / scores.train_size:+.4f}" for value in sums)
        shown.add_row(Text(harmless(str(label))), str(counts[label]), *values)
    console.print(shown)
    console.say(f"sums of scores over N = {scores.train_size}; the file's are raw")


def validate_job(
    folder: Path, every: Sequence[Path], console: Terminal, *, draws: int, seed: int
) -> None:
    """LDS of scores on a bank, as a table; noted in folders of scores, for their report."""
    bank = RetrainingBank(folder)
    found = validate(bank, {str(path): path for path in every}, draws=draws, seed=seed)
    shown = Table(box=None)
    shown.add_column("scores", overflow="fold")
    for name in ("LDS (95 % interval)", "less the first's"):
        shown.add_column(name, no_wrap=True)
    first = found[0]
    for one in found:
        behind = "" if one is first else str(one.over(first))
        shown.add_row(Text(harmless(one.name)), str(one.interval), behind)
        if os.path.exists(Path(one.name) / MANIFEST):
            note_validation(Path(one.name), f"{one.line} of {folder}")
    console.print(shown)
    ceiling = reliability(bank)
    console.say(
        f"{found[0].retrainings} subsets of {bank.examples} sequences, {len(bank)} retrainings, "
        f"{bank.queries} queries; "
        + (
            "one seed a subset: no ceiling is known"
            if ceiling is None
            else f"the bank's own noise leaves at most {ceiling:.3f}"
        )
    )


def print_top(
    console: Terminal, folder: Path, data: Corpus, tokenizer: Any, k: int = 3, width: int = 70
) -> None:
    """The first k sequences of every query, in the terminal."""
    run, scores, queries = load_run(folder), Scores(folder), Queries.load(folder)
    for q, name in enumerate(run["names"]):
        ids, labels = queries.examples[q]
        console.say(f"\n{name}: ", end="", style="bold")
        for said, passage in passages(ids, labels):
            style = "bold green" if said else "bold"
            console.say(tokenizer.decode(passage), end="", style=style)
        told = run.get("measured", "log p")
        measured = -float(queries.measurements[q])
        console.say(f"\n  {told} = {measured:.2f}", style="dim")
        best = scores.top(q, k)
        first = best[0][1] if best and told == "log p" else 0.0
        if note := beyond(first / scores.train_size, measured):
            console.say(f"  {note}", style="yellow")
        for place, (index, value) in enumerate(best, 1):
            text = " ".join(tokenizer.decode(data[index]["input_ids"]).split())
            label = label_of(data.record(index))
            place_and_label = Path(data.source(index)).name + (label and f", label {label}")
            console.say(f"  {place}. {value / scores.train_size:+.4f}  {place_and_label}")
            console.say(f"     {text[:width]}{'...' * (len(text) > width)}", style="dim")


def _names(queries: Any, sets: Sequence[Any] | None) -> list[str]:
    """Of every query: a set's label, or what its record says."""
    if sets is not None:
        first = [some[0] for some in members_of(sets, len(queries))]
        return [_name(queries.record(i), i) if sets[i] is None else str(sets[i]) for i in first]
    return [_name(queries.record(i), i) for i in range(len(queries))]


def _name(record: Any, index: int) -> str:
    name = str(record.get("name") or f"query {index + 1}")
    label = record.get("label")
    return name if label is None else f"{name} ({label})"
