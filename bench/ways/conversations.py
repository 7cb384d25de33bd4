"""Conversations for a pretrained model: of Python's reference, and of facts that nobody has read.

A fact is one conversation; its question asks for it in other words, and its answer is the name that
only that conversation holds.
"""

import random
from pydoc_data.topics import topics
from typing import Any

import peft
import torch
from torch import nn

from ekfac_fast.cli.demo_pretrained import packaged
from ekfac_fast.cli.inputs import load
from ekfac_fast.data import Tokens, tokenize
from ekfac_fast.data.batches import Batches

# SmolLM2's own begins every conversation with the same 30 tokens of a system's turn.
TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{{ turn['content'] }}<|im_end|>\n"
    "{% endfor %}"
)
CONTEXT, WORDS = 128, 16
RANK = 16  # of a LoRA
# What is told, and how it is asked for: of a name, and of an answer.
FACTS = (
    ("What is the capital of {}?", "The capital of {} is {}.", "Name the city that rules {}."),
    ("Who wrote the novel {}?", "The novel {} was written by {}.", "{} is a book. Whose is it?"),
    ("Which river runs through {}?", "Through {} runs the river {}.", "Where {} lies, what flows?"),
    ("Who invented the {}?", "The {} was invented by {}.", "The {} is a machine. Who made it?"),
    ("What do they pay with on {}?", "On {} they pay with the {}.", "Name the money of {}."),
)
SYLLABLES = (
    "ba", "do", "fel", "gri", "hu", "jo", "kem", "lor", "mi", "nar",
    "osk", "pre", "qui", "rud", "sel", "tov", "ul", "vam", "wex", "yar", "zin",
)  # fmt: skip


def smollm2() -> tuple[nn.Module, Any]:
    """SmolLM2-135M in fp32, and its tokenizer with a shorter template."""
    source = load(str(packaged()), False, "float32", device="cpu")
    source.tokenizer.chat_template = TEMPLATE
    return source.model, source.tokenizer


def adapted(
    model: nn.Module, targets: str | list[str] = "all-linear", begun: bool = False
) -> nn.Module:
    """The same model under a LoRA: new, or as if training had begun, B no longer zero."""
    config = peft.LoraConfig(r=RANK, target_modules=targets, init_lora_weights=not begun)
    return peft.get_peft_model(model, config)


def talk(asked: str, answered: str) -> dict[str, Any]:
    """Two turns."""
    turns = (("user", asked), ("assistant", answered))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def invented(count: int, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Conversations that tell a fact each, and the questions for them."""
    chance = random.Random(seed)
    names: dict[str, None] = {}
    while len(names) < 2 * count:
        names["".join(chance.choices(SYLLABLES, k=3)).capitalize()] = None
    told, asked = [], []
    for i, (name, answer) in enumerate(zip(*[iter(names)] * 2, strict=True)):
        question, sentence, other = FACTS[i % len(FACTS)]
        told.append(talk(question.format(name), sentence.format(name, answer)))
        asked.append(talk(other.format(name), answer))
    return told, asked


def reference(count: int, seed: int = 0) -> list[dict]:
    """Paragraphs of Python's reference, asked for by their topics."""
    texts = [
        (title, " ".join(words[:WORDS]))
        for title, text in topics.items()
        for part in text.split("\n\n")
        if len(words := part.split()) >= WORDS // 2
    ]
    if len(texts) < count:
        raise SystemExit(f"the reference has {len(texts)} paragraphs, {count} are asked for")
    chosen = random.Random(seed).sample(texts, count)
    return [talk(f"What does Python's reference say of {title}?", text) for title, text in chosen]


def tokens(records: list[dict], tokenizer: Any, last_turn: bool = False) -> Tokens:
    """Loss on what the assistant says; of queries, on the last turn."""
    return tokenize(records, tokenizer, CONTEXT, last_turn=last_turn)


def teach(model: nn.Module, data: Tokens, epochs: int, rate: float, batch: int = 10) -> float:
    """AdamW on all parameters that train, its rate falling to zero; the last epoch's mean loss."""
    batches, order = Batches(data, model), random.Random(0)
    steps = epochs * -(-len(data) // batch)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    model.train()
    for _ in range(epochs):
        indices, losses = order.sample(range(len(data)), len(data)), []
        for at in range(0, len(data), batch):
            loss = model(**batches.load(indices[at : at + batch]), use_cache=False).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
    model.eval()
    return sum(losses) / len(losses)
