"""What a command is given: a model and its tokenizer, text cut into sequences."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checks import listed, whole
from ..data.batches import positions
from ..data.choices import OnLong, Split
from ..data.examples import Corpus
from ..data.labelled import Labelled, read_labelled
from ..data.packing import pack
from ..data.pairs import Pairs, read_pairs
from ..data.records import read
from ..data.token_files import are_tokens, open_tokens
from ..data.tokens import tokenize
from ..errors import ArgumentError, Error, Notice
from ..extras import optional
from ..model.weights import usual_device
from ..stages.references import Referenced, referenced
from .options import Dtype, Kind, Stored
from .terminal import Terminal

CONTEXT = 512
# The class of transformers that loads a model.
CLASSES: Mapping[Kind, str] = {
    "language-model": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "reward": "AutoModelForSequenceClassification",
    "dpo": "AutoModelForCausalLM",
}
LABELLED = ("sequence-classification", "token-classification")
# Models whose tokenizers take words only where each begins with a space.
SPACED = ("gpt2", "roberta", "deberta", "bloom", "bart", "longformer")


@dataclass(frozen=True)
class Cutting:
    """How text becomes sequences: of at most `context` tokens, from records that `split` makes of
    a text file, or that `fields` finds in others; longer ones are cut in chunks, truncated or
    refused; `packed`, several are one sequence. `chat_template`: of conversations, in place of the
    tokenizer's own. Of a `task` that is no language model's: `labels` by name, and the file of
    pairs' log-probabilities.
    """

    context: int
    split: Split = "file"
    on_long: OnLong = "chunk"
    fields: dict[str, str] | None = None
    chat_template: str | None = None
    task: Kind | None = None
    labels: dict[str, int] | None = None
    references: str | None = None
    packed: bool = False


@dataclass(frozen=True)
class Source:
    """A model's folder, name or GGUF file, its tokenizer, what its passes are autocast to, and the
    folder or name of the adapter in it.
    """

    path: str
    model: nn.Module
    tokenizer: Any
    autocast: torch.dtype | None = None
    adapter: str | None = None

    def context(self, wanted: int | None) -> int:
        """Tokens a sequence: as wanted (512), but no more than the model has positions for."""
        if wanted is not None:
            whole("context", wanted, 2)
        limit = positions(self.model)
        if wanted and limit and wanted > limit:
            warnings.warn(f"context is {wanted}: the model has {limit} positions", Notice, 2)
        return min(wanted or CONTEXT, limit) if limit else wanted or CONTEXT


def load(
    path: str,
    trust_remote_code: bool,
    dtype: Dtype = "float32",
    device: str | None = None,
    adapter: str | None = None,
    chat_template: str | None = None,
    kind: Kind = "language-model",
    device_map: str | None = None,
) -> Source:
    """A Hugging Face model of a kind in evaluation mode, on a GPU if there is one, or spread as a
    `device_map` says; peft's `adapter` in it.
    """
    if device_map is not None:
        optional("accelerate", "spread")
    transformers = optional("transformers", "hf")
    place = torch.device(device) if device else usual_device()
    lowered = autocast(dtype, place)
    with loading(path):
        where, file = checkpoint(path)
        model, found = getattr(transformers, CLASSES[kind]).from_pretrained(
            where,
            **file,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            device_map=device_map,
            # A checkpoint of bf16 is computed in fp32 where that was asked for.
            dtype="auto" if lowered else torch.float32,
        )
    if absent := sorted(found["missing_keys"]):
        raise ArgumentError(
            f"model {path!r} has no weights for {listed(absent, 3)}: they would be drawn at "
            f"random; give the checkpoint of a {type(model).__name__}"
        )
    if adapter is not None:
        model = with_adapter(model, adapter)
    # Words apart are not words after a space to byte-level tokenizers, unless they are told.
    words = model.config.model_type in SPACED and kind == "token-classification"
    tokenizer = load_tokenizer(path, trust_remote_code, chat_template, words)
    model = model if device_map else model.to(place)
    return Source(path, model.eval(), tokenizer, lowered, adapter)


def shape(path: str, trust_remote_code: bool) -> nn.Module:
    """A model without weights: parameters that know their sizes alone."""
    transformers = optional("transformers", "hf")
    with loading(path):
        where, file = checkpoint(path)
        config = transformers.AutoConfig.from_pretrained(
            where, **file, trust_remote_code=trust_remote_code
        )
    with torch.device("meta"):
        made: nn.Module = transformers.AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code
        )
    return made


def with_adapter(model: nn.Module, adapter: str) -> nn.Module:
    """A model with peft's adapter of a folder or name put into it.

    Raises:
        ArgumentError: there is none, it is a pickle, it is for another model.
    """
    peft = optional("peft", "adapters")
    folder = Path(adapter)
    if folder.is_dir() and not (folder / "adapter_model.safetensors").exists():
        raise ArgumentError(
            f"adapter {adapter!r}: the folder has no adapter_model.safetensors; save it with "
            "save_pretrained, as safetensors"
        )
    with loading(adapter, "adapter"):
        found: nn.Module = peft.PeftModel.from_pretrained(
            model, adapter, autocast_adapter_dtype=False
        )
    return found


def autocast(dtype: Dtype, device: torch.device) -> torch.dtype | None:
    """What passes are autocast to; "auto" is bf16 where the device multiplies it."""
    if dtype == "auto":
        multiplies = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if device.type == "cuda"
            else torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
        dtype = "bfloat16" if multiplies else "float32"
    return torch.bfloat16 if dtype == "bfloat16" else None


def rounding(dtype: Stored) -> torch.dtype | None:
    """What eigenvectors are rounded to; None where they are kept as they are."""
    return torch.bfloat16 if dtype == "bfloat16" else None


def load_tokenizer(
    path: str, trust_remote_code: bool, chat_template: str | None = None, words: bool = False
) -> Any:
    """The tokenizer beside a model; with another chat template than its own, if one is given.

    words: texts come as words, each of which follows a space.
    """
    transformers = optional("transformers", "hf")
    with loading(path):
        where, file = checkpoint(path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            where,
            **file,
            trust_remote_code=trust_remote_code,
            **({"add_prefix_space": True} if words else {}),
        )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def checkpoint(path: str) -> tuple[str, dict[str, str]]:
    """A model's folder or name, and its one file where that is what `path` names (GGUF)."""
    if not path.lower().endswith(".gguf"):
        return path, {}
    file = Path(path)
    if not file.is_file():
        raise ArgumentError(f"model {path!r}: no such file")
    optional("gguf", "gguf")
    return str(file.parent), {"gguf_file": file.name}


@contextmanager
def loading(path: str, what: str = "model") -> Iterator[None]:
    """ArgumentError where a library finds nothing of its own kind under a name."""
    try:
        yield
    except Error:
        raise
    except Exception as error:  # of any kind: a folder holds whatever files it holds
        raise ArgumentError(f"{what} {path!r} cannot be loaded: {error}") from error


def parsed_fields(words: str | None) -> dict[str, str] | None:
    """prompt=question,completion=answer as a mapping; ArgumentError where it is none."""
    if words is None:
        return None
    pairs = [part.partition("=") for part in words.split(",")]
    names = [name.strip() for name, _, _ in pairs]
    if not all(equals for _, equals, _ in pairs) or len(set(names)) < len(names):
        raise ArgumentError(
            f"--fields is {words!r}, expected names with what a file calls them, "
            "like text=body or prompt=question,completion=answer"
        )
    return dict(zip(names, (theirs.strip() for _, _, theirs in pairs), strict=True))


def read_template(path: Path | None) -> str | None:
    """A chat template of a file."""
    if path is None:
        return None
    if not path.is_file():
        raise ArgumentError(f"--chat-template {path}: no such file")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"--chat-template {path}: cannot be read ({error})") from error


def read_examples(
    path: Path, tokenizer: Any, cutting: Cutting, keep: Sequence[str] = ()
) -> Labelled | Pairs | Referenced:
    """The examples of a file for a task that is no language model's."""
    if cutting.task in LABELLED:
        return read_labelled(
            path, tokenizer, cutting.context, cutting.labels, fields=cutting.fields, keep=keep,
            words=cutting.task == "token-classification", on_long=cutting.on_long,
        )  # fmt: skip
    pairs = read_pairs(
        path, tokenizer, cutting.context, special_tokens=cutting.task == "reward",
        fields=cutting.fields, keep=keep, on_long=cutting.on_long,
    )  # fmt: skip
    if cutting.references is None:
        return pairs
    return referenced(None, pairs, file=cutting.references)


def read_data(
    path: Path, tokenizer: Any, cutting: Cutting, console: Terminal, keep: Sequence[str] = ()
) -> Corpus:
    """A corpus as examples; says what was cut off or left out."""
    if cutting.task not in (None, "language-model"):
        _not_packed(cutting, path, f"a corpus for {cutting.task}")
        examples = read_examples(path, tokenizer, cutting, keep)
        told = f"; {examples.truncated} lost {examples.dropped} tokens" * (examples.truncated > 0)
        console.say(f"{path}: {len(examples)} examples for {cutting.task}{told}")
        return examples
    if cutting.fields is None and are_tokens(path):
        _not_packed(cutting, path, "tokens: its sequences are made")
        # Ids of such a vocabulary take more than two bytes.
        wide = path.suffix.lower() == ".bin" and len(tokenizer) > 1 << 16
        mapped = open_tokens(path, cutting.context, dtype="uint32" if wide else None, keep=keep)
        console.say(f"{path}: {len(mapped)} sequences of tokens, mapped")
        return mapped
    records = read(path, split=cutting.split, fields=cutting.fields, keep=keep)
    data = tokenize(records, tokenizer, cutting.context, on_long=cutting.on_long, on_empty="skip")
    corpus = pack(data, cutting.context) if cutting.packed else data
    notes = [f"{len(corpus)} sequences of at most {cutting.context} tokens"]
    if cutting.packed:
        notes[0] += f", of {len(data)} documents"
    if data.truncated:
        notes.append(f"{data.truncated} records lost {data.dropped} tokens")
    if data.skipped:
        notes.append(f"{data.skipped} records skipped, which have nothing to predict in that")
    console.say(f"{path}: {'; '.join(notes)}")
    return corpus


def _not_packed(cutting: Cutting, path: Path, holds: str) -> None:
    """ArgumentError where this corpus, of no records of text, is to be packed."""
    if cutting.packed:
        raise ArgumentError(
            f"--packed is of records of text or conversations; {path} holds {holds}"
        )
