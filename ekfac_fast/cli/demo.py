"""The whole job on a laptop, from nothing: a corpus, a tokenizer, a small GPT-2, its influences.

The corpus is real English that every Python carries (`pydoc_data.topics`, the language reference);
the model is trained here, on it, in a few minutes, and saved as an ordinary Hugging Face
checkpoint. From there on the demo runs the same functions as any user.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.batches import Batches
from ..data.examples import Corpus
from ..data.records import read
from ..data.tokens import tokenize
from ..extras import optional
from ..model.layers import select_layers
from ..model.tasks import LanguageModelTask
from ..report.text import duration
from ..stages.floor import floor_seconds
from ..stages.queries import Queries
from ..stages.scores import Scores
from ..store.files import save_json, writing
from ..validation.one_step import step_check
from . import inputs, runs
from .inputs import autocast
from .progress import showing
from .terminal import Terminal

CONTEXT = 128
VOCABULARY = 4096
LAYERS, WIDTH, HEADS = 4, 256, 4
STEPS, BATCH, LEARNING_RATE = 1000, 16, 1.5e-3

# In the words of the reference: a model this small knows sentences, not facts.
QUERIES = (
    (
        "with",
        'The "with" statement is used to wrap the execution of a block with methods defined by a',
        " context manager.",
    ),
    (
        "yield",
        "Using yield in a function definition is sufficient to cause that definition to create a",
        " generator function instead of a normal function.",
    ),
    (
        "global",
        'The "global" statement means that the listed identifiers are to be interpreted as',
        " globals.",
    ),
    (
        "lambda",
        "Lambda expressions (sometimes called lambda forms) are used to create",
        " anonymous functions.",
    ),
    ("class", "A class definition defines a", " class object."),
    (
        "import",
        'The basic import statement (no "from" clause) is executed in two steps: 1.',
        " find a module, loading and initializing it if necessary",
    ),
    (
        "slots",
        "*__slots__* allow us to explicitly declare data members (like properties) and deny the",
        ' creation of "__dict__"',
    ),
    (
        "try",
        'If the "finally" clause raises another exception, the saved exception is set as the',
        " context of the new exception.",
    ),
)


def write_corpus(folder: Path, count: int | None = None) -> Path:
    """Topics of Python's language reference, one text file each; those asked about come first."""
    from pydoc_data.topics import topics

    folder.mkdir(parents=True, exist_ok=True)
    asked = [name for name, *_ in QUERIES]
    for name in sorted(topics, key=lambda name: (name not in asked, name))[:count]:
        text = topics[name].strip() + "\n"
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def write_queries(path: Path) -> Path:
    """`QUERIES` as JSON lines."""
    lines = (
        json.dumps({"name": name, "prompt": prompt, "completion": completion})
        for name, prompt, completion in QUERIES
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def train_tokenizer(corpus: Path, out: Path) -> Any:
    """A byte-level BPE of the corpus, saved as a Hugging Face tokenizer."""
    tokenizers, transformers = optional("tokenizers", "hf"), optional("transformers", "hf")
    backend = tokenizers.ByteLevelBPETokenizer()
    backend.train(
        [str(path) for path in sorted(corpus.glob("*.txt"))],
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer, eos_token="<|endoftext|>", model_max_length=CONTEXT
    )
    tokenizer.save_pretrained(out)
    return tokenizer


def train_model(
    data: Corpus,
    out: Path,
    steps: int = STEPS,
    progress: Callable[[int, int, float], None] | None = None,
) -> nn.Module:
    """A GPT-2 of 4.2M parameters, trained on `data`, in bf16 where that is fast."""
    transformers = optional("transformers", "hf")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=CONTEXT,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    batches, task = Batches(data, model), LanguageModelTask()
    lowered = autocast("auto", torch.device("cpu"))
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    warm = min(50, steps)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warm) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    for step in range(steps):
        if len(order) < BATCH:
            order += torch.randperm(len(data), generator=generator).tolist()
        batch = batches.load([order.pop() for _ in range(min(BATCH, len(order)))])
        tokens = (batch["labels"][:, 1:] >= 0).sum()
        with torch.autocast("cpu", lowered, enabled=lowered is not None):
            loss = task.compute_train_loss(batch, model) / tokens
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if progress:
            progress(step + 1, steps, loss.item())
    model.eval().save_pretrained(out)
    return model


def prepare(
    folder: Path,
    steps: int = STEPS,
    topics: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> None:
    """Corpus, queries, tokenizer and model in `folder`; what is there already is kept."""
    corpus, queries, model = folder / "corpus", folder / "queries.jsonl", folder / "model"
    if not (model / "trained.json").exists():
        write_corpus(corpus, topics)
        write_queries(queries)
        tokenizer = train_tokenizer(corpus, model)
        train_model(tokenize(read(corpus), tokenizer, CONTEXT), model, steps, progress)
        save_json(model / "trained.json", {"steps": steps})


def weaknesses(scores: Scores, data: Corpus, changes: list[tuple[float, float]]) -> list[str]:
    """What a reader of the demo should know before believing it."""
    up = sum(top > 0 for top, _ in changes)
    down = sum(bottom < 0 for _, bottom in changes)
    return [
        f"A model of 4M parameters that has read {len(data)} sequences over and over: its "
        "completions are memorised more than understood, and so are its influences.",
        f"One gradient step on a query's top sequence raised the completion's log-probability for "
        f"{up} of {len(changes)} queries; one on its bottom sequence lowered it for {down}.",
        "Sequences that merely share words with a query come high beside those that explain it.",
    ]


def run(folder: Path, steps: int, topics: int | None, console: Terminal) -> None:
    """The whole job, from nothing to a report."""
    start = time.perf_counter()
    with writing(folder, 4096):
        folder.mkdir(parents=True, exist_ok=True)
    with showing(console) as progress:
        prepare(folder, steps, topics, lambda done, total, _: progress("training", done, total))
    source = inputs.load(str(folder / "model"), False, device="cpu")
    cutting = inputs.Cutting(CONTEXT)
    corpus = inputs.read_data(folder / "corpus", source.tokenizer, cutting, console)
    factors = runs.fit_job(source, corpus, folder / "factors", console)
    out = folder / "scores"
    scores = runs.score_job(
        source, factors, folder / "queries.jsonl", corpus, cutting, out, console, rank=32,
        damping=None,
    )  # fmt: skip
    runs.print_top(console, out, corpus, source.tokenizer)
    floor = floor_seconds(source.model, corpus, select_layers(source.model, scores.layers))
    changes = step_check(source.model, Queries.load(out), scores, corpus)
    notes = weaknesses(scores, corpus, changes)
    path = runs.report_job(out, corpus, source.tokenizer, folder / "report.html", 10, floor, notes)
    console.say()
    for note in notes:
        console.say(note)
    console.say(
        f"scan: {scores.seconds:.1f} s for {len(corpus)} sequences and {len(changes)} queries, "
        f"{scores.seconds / floor:.2f} x a forward and gradient-to-activations backward alone "
        f"({floor:.1f} s)"
    )
    console.say(f"{path}, after {duration(time.perf_counter() - start)}")
