"""Whole models at real shapes: every stage's pass, ours beside plain torch and beside the floor.

    python bench/stages.py [--device cpu|cuda] [--models gpt2 llama-3-8b ...] [--stages scoring ...]
        [--layers 4] [--tokens 512] [--sequences 8] [--queries 64] [--rank 32] [--compile]
        [--repeats 5] [--threads 2] [--out bench/results/stages.jsonl] [--smoke]

Random weights, random tokens, one batch; bf16 on a GPU, fp32 on a CPU. Stages are the consumers of
`fit`, `prepare_queries` and `score`, what runs once a batch, without their files;
eigendecompositions are torch's own, and left out: orthogonal matrices stand in.

The floor is the same batch forward, and backward to the activations from the first tracked layer
on, without weight gradients: what no engine can beat. Results are compared first, on the batch that
is timed; a wrong one is not timed. `--layers N` keeps N blocks of a model that does not fit: the
embedding and the head then weigh more than in the whole, in all three alike.
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.nn import functional as F

from ekfac_fast import ops
from ekfac_fast.curvature.query_gradients import Dense
from ekfac_fast.model.capture import Capture
from ekfac_fast.model.layer_batch import LayerBatch
from ekfac_fast.model.layers import linear_layers
from ekfac_fast.ops.shapes import Shape
from ekfac_fast.store.folder import Store
from measure import roofs
from measure.environment import device as device_named
from measure.environment import environment
from measure.rows import OURS, Row, append
from measure.timing import extra_bytes, measure
from ways.models import MODELS, Setting, build
from ways.stage_ways import STAGES, Ours, Plain, Start, agree, made_run, start

# Issue: a scan with 64 queries of rank 32 over the whole model, in floors.
SCAN_LIMIT = {"llama-3-8b": 1.35}


def plain_loss(setting: Setting, stage: str) -> Tensor:
    """The loss of a batch in plain torch; labels of the factors' stages are the model's draws."""
    logits = setting.model(input_ids=setting.batch["input_ids"], use_cache=False).logits
    logits = logits.flatten(0, 1).float()
    if stage in ("covariance", "eigenvalues"):
        labels = torch.multinomial(logits.detach().softmax(-1), 1).view_as(setting.batch["labels"])
        labels[:, -1] = -100
    else:
        labels = F.pad(setting.inputs(stage)["labels"][:, 1:], (0, 1), value=-100)
    return F.cross_entropy(logits, labels.flatten(), reduction="sum")


def ignore(seen: LayerBatch) -> None:
    """What the floor does with a layer."""


def passes(setting: Setting, stage: str, sides: dict[str, Ours | Plain]) -> dict[str, Callable]:
    """One pass over the batch by name: the floor, which starts at the first layer, and `sides`."""
    first = Capture(setting.model, setting.layers[:1])
    floor = "scoring" if stage in ("covariance", "eigenvalues") else stage
    found: dict[str, Callable] = {
        "floor": lambda: first(lambda: plain_loss(setting, floor), ignore)
    }
    for name, side in sides.items():
        capture = Capture(setting.model, setting.layers)

        def loss(side: Ours | Plain = side) -> Tensor:
            return side.loss() if isinstance(side, Ours) else plain_loss(setting, stage)

        found[name] = lambda capture=capture, loss=loss, side=side: capture(loss, side.consume)
    return found


def work(setting: Setting, stage: str, start: Start) -> int:
    """FLOPs of a pass: products of linear layers, forward and to activations, and the ops'.

    Attention's own products and everything pointwise are left out, so that MFU is a little low.
    """
    T = setting.batch["input_ids"].shape[1]
    every = list(linear_layers(setting.model).values())
    after = every[every.index(setting.layers[0]) + 1 :]
    flops = sum(2 * setting.tokens * x.I * x.O for x in (*every, *after))
    for x in setting.layers:
        s = Shape(start.sequences, T, x.I, x.O, start.queries, start.rank, x.bias)
        if stage == "covariance":
            if start.owners[x.name] == x.name:
                flops += ops.covariance.cost(Shape(setting.tokens, 1, x.I, bias=x.bias)).flops
            flops += ops.covariance.cost(Shape(setting.tokens, 1, x.O)).flops
        elif stage == "scoring":
            dense = isinstance(start.gradients[x.name], Dense)
            flops += (ops.dense_scores if dense else ops.low_rank_scores).cost(s).flops
        else:
            card = ops.eigenvalues if stage == "eigenvalues" else ops.precondition
            flops += card.cost(s).flops
    return flops


def run_stage(setting: Setting, stage: str, repeats: int, compiled: bool, store: Store) -> Row:
    """Check a stage on its batch, then time it; `store` is a folder that consumers know."""
    ids = setting.batch["input_ids"]
    device, dtype = ids.device, next(setting.model.parameters()).dtype
    torch.manual_seed(0)
    torch.compiler.reset()
    owners: dict[str, str] = {}

    def notice(seen: LayerBatch) -> None:
        owners[seen.layer.name] = seen.shared

    capture = Capture(setting.model, setting.layers)
    capture(lambda: plain_loss(setting, "scoring"), notice)
    run = made_run(setting.model, setting.inputs(stage))
    begun = start(stage, setting.layers, owners, run, setting.queries, setting.rank)
    sides: dict[str, Ours | Plain] = {"ours": Ours(stage, begun, run, store, setting.inputs(stage))}
    sides["plain torch"] = Plain(stage, begun, compiled=False)
    if compiled:
        sides["plain torch, compiled"] = Plain(stage, begun, compiled=True)
    failed: dict[str, str] = {}

    def consume(seen: LayerBatch) -> None:
        for name, side in sides.items():
            try:
                side.consume(seen)
            except Exception as error:
                if name == "ours":
                    raise
                failed[name] = str(error).partition("\n")[0]

    capture(lambda: plain_loss(setting, stage), consume)
    sides = {name: side for name, side in sides.items() if name not in failed}
    errors = [agree(sides["ours"], side, dtype) for name, side in sides.items() if name != "ours"]
    calls = passes(setting, stage, sides)
    rate = roofs.gemm_rate(dtype, device)
    samples = measure(calls, repeats, device)
    seconds = {name: statistics.median(taken) for name, taken in samples.items()}
    extra = {}
    for name, call in calls.items():
        with extra_bytes(device) as taken:
            call()
        extra[name] = taken()
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    return Row(
        bench="stages",
        name=setting.name,
        quantity=stage,
        shape=setting.shape,
        dtype=str(dtype).removeprefix("torch."),
        seconds=seconds,
        samples=samples,
        extra_bytes=extra,
        failed=failed,
        error=max(errors, default=None),
        flops=work(setting, stage, begun),
        roofs={"flops_per_second": rate},
        details={"held_bytes": held},
    )


def line(row: Row) -> str:
    """The printed line."""
    others = (f"{row.times(way):.2f}x {way}" for way in row.seconds if way not in (OURS, "floor"))
    return " | ".join(
        [
            f"{row.name} ({row.shape['blocks']} of {row.shape['all_blocks']} blocks)"
            f" {row.quantity} {row.dtype}",
            f"{row.shape['sequences'] * row.shape['tokens'] / row.ours:.0f} tokens/s",
            f"MFU {row.gemm_share:.0%}",
            f"{row.over('floor'):.2f} floors",
            f"peak +{row.extra_bytes[OURS] / 2**20:.0f} MiB"
            f" (floor +{row.extra_bytes['floor'] / 2**20:.0f})",
            *others,
            *(f"{name} failed: {why}" for name, why in row.failed.items()),
        ]
    )


def verdict(row: Row) -> str | None:
    """The issue's requirement on a scan, where this row is what it asks for."""
    limit, sizes = SCAN_LIMIT.get(row.name), row.shape
    asked = row.quantity == "scoring" and sizes["queries"] == 64 and sizes["rank"] == 32
    whole = sizes["blocks"] == sizes["all_blocks"]
    if limit is None or not (asked and whole and row.dtype == "bfloat16"):
        return None
    got = row.over("floor")
    return (
        f"{row.name} scan | required at most {limit:.2f} floors | measured {got:.2f} "
        f"| {'met' if got <= limit else 'NOT MET'}"
    )


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line; sizes that are not given follow the device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["gpt2"])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--layers", type=int, metavar="N", help="blocks to build; default: all")
    sizes = {"tokens": (128, 512), "sequences": (4, 8), "queries": (8, 64)}
    for name, (cpu, cuda) in sizes.items():
        parser.add_argument(f"--{name}", type=int, help=f"default: {cpu}, on a GPU {cuda}")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--smoke", action="store_true", help="tiny models: does it run at all")
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    chosen = parser.parse_args(words)
    chosen.device = device_named(chosen.device)
    gpu = chosen.device.type == "cuda"
    for name, small in {"tokens": 24, "sequences": 3, "queries": 3}.items():
        default = small if chosen.smoke else sizes[name][gpu]
        setattr(chosen, name, getattr(chosen, name) or default)
    chosen.compile = gpu if chosen.compile is None else chosen.compile
    if chosen.layers is not None and chosen.layers < 1:
        parser.error(f"--layers {chosen.layers}: at least one block")
    return chosen


def main(words: list[str] | None = None) -> None:
    """Build each model, run its stages, print, append."""
    chosen = parse(words)
    torch.set_num_threads(chosen.threads)
    facts = environment(chosen.device)
    print(" | ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    failed = 0
    for name in chosen.models:
        gc.collect()  # hooks and closures of the model before are cycles
        sizes = (chosen.sequences, chosen.tokens, chosen.queries, chosen.rank)
        blocks = {"blocks": chosen.layers, "smoke": chosen.smoke}
        setting = build(name, **blocks, sizes=sizes, device=chosen.device)
        for stage in chosen.stages:
            try:
                with TemporaryDirectory() as at, Store.open(at, kind="bench", facts={}) as store:
                    row = run_stage(setting, stage, chosen.repeats, chosen.compile, store)
            except Exception as error:
                failed += 1
                print(f"{name} {stage} | FAILED: {error}", flush=True)
                if isinstance(error, torch.OutOfMemoryError):
                    print(f"{name} {stage} | does not fit: give --layers", flush=True)
                continue
            print(line(row), flush=True)
            if told := verdict(row):
                print(told, flush=True)
            if chosen.out:
                append(chosen.out, [replace(row, environment=facts)])
        del setting
    if failed:
        sys.exit(f"{failed} stages are wrong or did not run")


if __name__ == "__main__":
    main()
