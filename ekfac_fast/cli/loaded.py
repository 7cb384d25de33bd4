"""What most commands begin with: a model, and a corpus cut for it."""

from dataclasses import replace
from pathlib import Path

from ..data.examples import Corpus
from . import inputs, tasks
from .group import check_device_map, sharded
from .options import Loading
from .reported import console


def loaded(
    model: str, data: Path, how: Loading, asked: tasks.Asked, folders: list[Path]
) -> tuple[inputs.Source, inputs.Cutting, Corpus]:
    """A model, and a corpus cut for it as the command line asks; `folders` may keep what a
    reference model says of it.
    """
    mapping, template = inputs.parsed_fields(how.fields), inputs.read_template(how.chat_template)
    if how.device_map is not None:
        check_device_map(how.shard)
    source = inputs.load(
        model, how.trust_remote_code, how.dtype, adapter=how.adapter, chat_template=template,
        kind=asked.kind, device_map=how.device_map,
    )  # fmt: skip
    if how.shard:
        source = replace(source, model=sharded(source.model))
    console.say(f"passes in {'float32' if source.autocast is None else 'bfloat16'}")
    cutting = inputs.Cutting(
        source.context(how.context), how.split, how.on_long, mapping, template, packed=how.packed
    )
    if asked.kind != tasks.LANGUAGE:
        cutting = replace(cutting, task=asked.kind, labels=tasks.labels_of(source, asked.kind))
    corpus = inputs.read_data(data, source.tokenizer, cutting, console)
    if asked.kind == "dpo":
        files = [tasks.beside(folder, tasks.REFERENCED) for folder in folders]
        corpus, file = tasks.with_references(
            corpus, source, asked.reference, files, how.trust_remote_code, console
        )
        cutting = replace(cutting, references=file)
    return source, cutting, corpus
