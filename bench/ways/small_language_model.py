"""A GPT-2 of a third of a million weights on Python's reference: small enough to train a hundred.

Text is `pydoc_data.topics`, in every Python; its tokens are a byte-level BPE's, made of the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import ClassVar

import numpy as np
import torch

from ekfac_fast.data.batches import Batches
from ekfac_fast.model.tasks import LanguageModelTask
from ekfac_fast.store.files import load_json, save_json

VOCABULARY, CONTEXT, PROMPT = 1024, 64, 32
WARM = 20


@dataclass(frozen=True)
class Training:
    """(indices, seed) -> a GPT-2 trained on those sequences; the same in every process.

    AdamW, a linear warm-up and a cosine to a twentieth, one order of the data an epoch. `seed` is
    that of the first weights and of the orders.
    """

    data: list[dict] = field(repr=False)
    epochs: int
    width: int = 64
    blocks: int = 4
    batch: ClassVar[int] = 16
    rate: ClassVar[float] = 3e-3

    def __call__(self, indices: np.ndarray, seed: int) -> torch.nn.Module:
        """A model in evaluation mode."""
        return descended(self.begun(seed), self.data, [*self.batches(indices, seed)], self.rate)

    def begun(self, seed: int) -> torch.nn.Module:
        """What is trained."""
        return self.untrained(seed)

    def batches(self, indices: np.ndarray, seed: int) -> Iterator[tuple[np.ndarray, int]]:
        """(indices, by how many sequences their loss is divided): the data in another order an
        epoch.
        """
        for epoch in range(self.epochs):
            order = np.random.default_rng([seed, epoch]).permutation(indices)
            for some in np.array_split(order, -(-len(indices) // self.batch)):
                yield some, len(some)

    def untrained(self, seed: int) -> torch.nn.Module:
        """With its first weights."""
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=self.width, n_layer=self.blocks,
            n_head=4, bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0,
        )  # fmt: skip
        return GPT2LMHeadModel(config)

    def model(self, seed: int, folder: Path) -> torch.nn.Module:
        """Trained on everything, kept in `folder`."""
        from transformers import GPT2LMHeadModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        kept = folder / f"seed_{seed}"
        if not (kept / "trained.json").exists():
            self(np.arange(len(self.data)), seed).save_pretrained(kept)
            save_json(kept / "trained.json", {"epochs": self.epochs})
        return GPT2LMHeadModel.from_pretrained(kept).eval()


@dataclass(frozen=True)
class FineTuning(Training):
    """(indices, seed) -> the model of the folder `start`, trained further on those sequences.

    What is left out is missing from its batch, and everything else is as it would be with it: the
    other batches, the steps, what the loss is divided by. So runs of one seed differ by what was
    left out and by nothing else. `seed` is that of the orders.
    """

    start: Path = Path()
    batch: ClassVar[int] = 64
    rate: ClassVar[float] = 1e-3

    def begun(self, seed: int) -> torch.nn.Module:
        """The same for every seed."""
        from transformers import GPT2LMHeadModel

        return GPT2LMHeadModel.from_pretrained(self.start)

    def batches(self, indices: np.ndarray, seed: int) -> Iterator[tuple[np.ndarray, int]]:
        """(what is kept of a batch of the whole data, how many it would be)."""
        for some, size in super().batches(np.arange(len(self.data)), seed):
            yield some[np.isin(some, indices)], size


def descended(
    model: torch.nn.Module, data: list[dict], batches: list[tuple[np.ndarray, int]], rate: float
) -> torch.nn.Module:
    """The model after AdamW on these batches, in evaluation mode."""
    steps = len(batches)
    load, task = Batches(data, model).load, LanguageModelTask()
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)

    def share(step: int) -> float:
        return min(1, (step + 1) / WARM) * (0.525 + 0.475 * np.cos(np.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, share)
    model.train()
    for some, size in batches:
        optimiser.zero_grad()
        if len(some):
            loss = task.compute_train_loss(load(some.tolist()), model)
            (loss / (size * (CONTEXT - 1))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model.eval()


def sequences(count: int, held_out: int, file: Path) -> tuple[list[dict], list[dict], list[dict]]:
    """Training sequences, queries, and the rest of the text, kept in `file`: chunks of a text.

    A query's first half is its prompt. Its neighbours in the text are in the training data.
    """
    if not file.exists():
        save_json(file, {"chunks": _chunks()})
    chunks = load_json(file, ours=True)["chunks"]
    if len(chunks) < count + held_out:
        raise SystemExit(
            f"the text has {len(chunks)} sequences of {CONTEXT} tokens, not {count + held_out}"
        )
    chosen, rest = chunks[: count + held_out], chunks[count + held_out :]
    asked = set(np.linspace(0, len(chosen) - 1, held_out + 2)[1:-1].round().astype(int).tolist())
    data = [{"input_ids": ids} for at, ids in enumerate(chosen) if at not in asked]
    queries = [
        {"input_ids": chosen[at], "labels": [-100] * PROMPT + chosen[at][PROMPT:]}
        for at in sorted(asked)
    ]
    return data, queries, [{"input_ids": ids} for ids in rest]


def _chunks() -> list[list[int]]:
    """Whole chunks of the topics in a fixed random order."""
    from tokenizers import ByteLevelBPETokenizer

    names = sorted(topics)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        [topics[name] for name in names], vocab_size=VOCABULARY, show_progress=False
    )
    found: list[list[int]] = []
    for at in np.random.default_rng(0).permutation(len(names)):
        ids = tokenizer.encode(topics[names[at]]).ids
        found += [ids[i : i + CONTEXT] for i in range(0, len(ids) - CONTEXT + 1, CONTEXT)]
    return found
