"""The demo from nothing: a corpus, a tokenizer and a small GPT-2 trained on it in a few minutes.

The corpus is real English that every Python carries (`pydoc_data.topics`, the language reference).
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.batches import Batches
from ..data.records import read
from ..data.tokens import Tokens, tokenize
from ..extras import optional
from ..model.tasks import LanguageModelTask
from ..model.weights import usual_device
from ..store.files import save_json
from .demo import Demo, write_queries, write_topics
from .inputs import autocast

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
    """So many topics; None: all."""
    asked = [name for name, *_ in QUERIES]
    return write_topics(folder, asked, lambda _, number: count is None or number < count)


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
    data: Tokens,
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
    device = usual_device()
    batches, task = Batches(data, model.to(device)), LanguageModelTask()
    lowered = autocast("auto", device)
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
        with torch.autocast(device.type, lowered, enabled=lowered is not None):
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
        write_queries(queries, QUERIES)
        tokenizer = train_tokenizer(corpus, model)
        train_model(tokenize(read(corpus), tokenizer, CONTEXT), model, steps, progress)
        save_json(model / "trained.json", {"steps": steps})


def small(steps: int = STEPS, topics: int | None = None) -> Demo:
    """The demo of a model that is trained here.

    topics: use so many of them; None: all.
    """
    return Demo(
        prepare=lambda folder, progress: prepare(
            folder, steps, topics, lambda done, total, _: progress("training", done, total)
        ),
        notes=lambda _, data: [
            f"A model of 4M parameters that has read {len(data)} sequences over and over: its "
            "completions are memorised more than understood, and so are its influences.",
        ],
        context=CONTEXT,
    )
