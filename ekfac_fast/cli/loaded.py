"""What most commands begin with: a model, and a corpus cut for it."""

from dataclasses import replace
from pathlib import Path

from ..data.choices import OnLong, Split
from ..data.examples import Corpus
from . import inputs, tasks
from .group import check_device_map, sharded
from .options import Dtype
from .reported import console


def loaded(
    model: str,
    adapter: str | None,
    data: Path,
    context: int | None,
    split: Split,
    on_long: OnLong,
    packed: bool,
    fields: str | None,
    chat_template: Path | None,
    dtype: Dtype,
    trust_remote_code: bool,
    shard: bool,
    device_map: str | None,
    asked: tasks.Asked,
    folders: list[Path],
) -> tuple[inputs.Source, inputs.Cutting, Corpus]:
    """A model, and a corpus cut for it as the command line asks; `folders` may keep what a
    reference model says of it.
    """
    mapping, template = inputs.parsed_fields(fields), inputs.read_template(chat_template)
    if device_map is not None:
        check_device_map(shard)
    source = inputs.load(
        model, trust_remote_code, dtype, adapter=adapter, chat_template=template, kind=asked.kind,
        device_map=device_map,
    )  # fmt: skip
    if shard:
        source = replace(source, model=sharded(source.model))
    console.say(f"passes in {'float32' if source.autocast is None else 'bfloat16'}")
    cutting = inputs.Cutting(
        source.context(context), split, on_long, mapping, template, packed=packed
    )
    if asked.kind != tasks.LANGUAGE:
        cutting = replace(cutting, task=asked.kind, labels=tasks.labels_of(source, asked.kind))
    corpus = inputs.read_data(data, source.tokenizer, cutting, console)
    if asked.kind == "dpo":
        files = [tasks.beside(folder, tasks.REFERENCED) for folder in folders]
        corpus, file = tasks.with_references(
            corpus, source, asked.reference, files, trust_remote_code, console
        )
        cutting = replace(cutting, references=file)
    return source, cutting, corpus
