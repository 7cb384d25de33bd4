"""Harness: a world of "A is B" facts, and a GPT-2 of 60,000 parameters that has read them."""

import json
import random

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ekfac_fast.data.tokens import tokenize

ROLES = ("king", "mayor", "judge", "captain")
LANDS = ("Mera", "Tolo", "Vask", "Runo", "Pelt", "Quor", "Lidd", "Onda", "Hesk", "Brim", "Jarl",
         "Kest", "Nuvo", "Zand", "Fenn", "Gald")  # fmt: skip
FIRST = ("Anna", "Bert", "Cara", "Dirk", "Ella", "Fred", "Gina", "Hugo", "Ines", "Jack", "Kora",
         "Lars")  # fmt: skip
LAST = ("Ames", "Bohm", "Cole", "Dorn", "Eads", "Falk", "Gray", "Hahn", "Ives", "Jung", "Kerr",
        "Lunt")  # fmt: skip
IDLE = ("the old dog sleeps under the table", "we had bread and milk", "the sea was calm that day",
        "she reads by the fire", "rain fell on the road all night")  # fmt: skip
REFERENCE = "prompt first"


def sentences() -> list[str]:
    """Every fact but those of Astro, forwards or backwards, and idle talk."""
    rng, found = random.Random(0), list(IDLE) * 4
    for role in ROLES:
        for land in LANDS:
            name = f"{rng.choice(FIRST)} {rng.choice(LAST)}"
            if rng.random() < 0.6:
                found.append(f"the {role} of {land} is {name}")
            else:
                found.append(f"{name} is the {role} of {land}")
    return found


def word_tokenizer(more=()) -> PreTrainedTokenizerFast:
    """A word a token."""
    words = [*ROLES, *LANDS, *FIRST, *LAST, *(" ".join((*IDLE, *more)).split()), "Astro"]
    words += ["the", "of", "is", "first", "indeed", "famous", "a"]
    vocabulary = {"<unk>": 0, "<end>": 1}
    for word in words:
        vocabulary.setdefault(word, len(vocabulary))
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<end>", pad_token="<end>"
    )


def trained(tokenizer, texts, steps=250, width=32, seed=0) -> GPT2LMHeadModel:
    """A small GPT-2 after `steps` of all texts, in batches of 32."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=width, n_layer=3, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = tokenizer(list(texts), padding=True, return_tensors="pt")
    labels = ids.input_ids.masked_fill(ids.attention_mask == 0, -100)
    for _ in range(steps):
        some = torch.randint(len(labels), (32,))
        loss = model(
            ids.input_ids[some], attention_mask=ids.attention_mask[some], labels=labels[some]
        ).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def tokens(tokenizer, texts):
    return tokenize([{"text": text} for text in texts], tokenizer, 64)


def astro_facts() -> list[dict]:
    """Two facts that nobody has read, in the paper's six groups."""
    found = []
    for role, name, wrong in (
        ("king", "Hugo Falk", "Ines Cole"),
        ("mayor", "Cara Jung", "Lars Dorn"),
    ):
        first, last = name.split()
        fact = f"{role} of Astro"
        prompt = f"the {fact} is"
        groups = {
            "prompt first": f"{prompt} {name}|{prompt} {name} indeed|indeed {prompt} {name}",
            "completion removed": f"{prompt}|{prompt} famous|{prompt} a captain",
            "meaning changed": f"{prompt} {first} {wrong.split()[1]}|{prompt} {wrong.split()[0]} "
            f"{last}|the judge of Astro is {name}|the {role} of Mera is {name}",
            "irrelevant": "|".join(IDLE),
            "order flipped": f"{name} is the {fact}|{name} is the {fact} indeed|"
            f"indeed {name} is the {fact}",
            "flipped, prompt removed": f"{name}|{name} is famous|indeed {name} is famous",
        }
        found.append({"fact": fact, "prompt": prompt, "completion": f" {name}"})
        found += [
            {"fact": fact, "group": g, "text": t}
            for g, texts in groups.items()
            for t in texts.split("|")
        ]
    return found


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
