"""A GPT-2 of a third of a million weights on Python's reference: small enough to train a hundred.

Text is `pydoc_data.topics`, in every Python; its tokens are a byte-level BPE's, made of the same.
"""

from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch

from ekfac_fast.data.batches import Batches
from ekfac_fast.model.tasks import LanguageModelTask
from ekfac_fast.store.files import load_json, save_json

VOCABULARY, CONTEXT, PROMPT = 1024, 64, 32
BATCH, RATE, WARM = 16, 3e-3, 20


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

    def __call__(self, indices: np.ndarray, seed: int) -> torch.nn.Module:
        """A model in evaluation mode."""
        model = self.untrained(seed)
        batches, task = Batches(self.data, model), LanguageModelTask()
        optimiser = torch.optim.AdamW(
            model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01
        )
        a_epoch = -(-len(indices) // BATCH)
        steps = self.epochs * a_epoch

        def rate(step: int) -> float:
            return min(1, (step + 1) / WARM) * (0.525 + 0.475 * np.cos(np.pi * step / steps))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
        for epoch in range(self.epochs):
            order = np.random.default_rng([seed, epoch]).permutation(indices)
            for some in np.array_split(order, a_epoch):
                batch = batches.load(some.tolist())
                loss = task.compute_train_loss(batch, model)
                optimiser.zero_grad()
                (loss / (batch["labels"][:, 1:] >= 0).sum()).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                schedule.step()
        return model.eval()

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


def sequences(count: int, held_out: int, file: Path) -> tuple[list[dict], list[dict]]:
    """Training sequences and queries, kept in `file`: chunks of a text, some of them held out.

    A query's first half is its prompt. Its neighbours in the text are in the training data.
    """
    if not file.exists():
        save_json(file, {"chunks": _chunks(count + held_out)})
    chunks = load_json(file, ours=True)["chunks"]
    asked = set(np.linspace(0, len(chunks) - 1, held_out + 2)[1:-1].round().astype(int).tolist())
    data = [{"input_ids": ids} for at, ids in enumerate(chunks) if at not in asked]
    queries = [
        {"input_ids": chunks[at], "labels": [-100] * PROMPT + chunks[at][PROMPT:]}
        for at in sorted(asked)
    ]
    return data, queries


def _chunks(count: int) -> list[list[int]]:
    """Whole chunks of the topics in a fixed random order, as many as are wanted."""
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
    if len(found) < count:
        raise SystemExit(f"the text has {len(found)} sequences of {CONTEXT} tokens, not {count}")
    return found[:count]
