"""Every causal class of transformers, tiny: our factors and scores against per-sample gradients.

    python bench/families.py --out bench/results/families.jsonl     # all of them
    python bench/families.py --only BloomForCausalLM                # some
    python bench/families.py --table bench/results/families.jsonl   # docs/models.md

Sequences of different lengths go through `fit`, `prepare_queries` and `score` in one padded batch.
The truth is autograd's gradient of the parameters themselves, one sequence at a time without
padding, with the same sampled labels; of the covariances, the layers' inputs and outputs' gradients
there. In fp64 where the class computes in it, else fp32.
"""

import argparse
import json
import re
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ekfac_fast.errors import Error
from ekfac_fast.model.layers import ROUTER, Layer, linear_layers, select_layers
from ekfac_fast.model.tasks import LanguageModelTask
from ekfac_fast.stages.fit import COVARIANCE_DRAW, EIGENVALUE_DRAW, fit
from ekfac_fast.stages.preparation import prepare_queries
from ekfac_fast.stages.scan import score
from pages.family_table import outcome, write
from ways import family_models
from ways.expert_products import Slices, own

# Norms and softmaxes compute in fp32 in most classes, whatever the model is.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
# Three batches: of equal lengths, padded, and of one sequence.
LENGTHS, ASKED, BATCH_TOKENS = (5, 11, 8, 11, 7, 11, 11), (9, 6), 33
SECONDS = 60
ATTENTION = re.compile(r"attn|attention|mixer|mamba", re.IGNORECASE)


def examples(vocabulary: int) -> tuple[list[dict], list[dict]]:
    """Training sequences and queries."""
    generator = torch.Generator().manual_seed(2)
    ids = [
        torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in LENGTHS + ASKED
    ]
    data, asked = ids[: len(LENGTHS)], ids[len(LENGTHS) :]
    return (
        [{"input_ids": x, "id": i} for i, x in enumerate(data)],
        [{"input_ids": x, "labels": [-100] * 3 + x[3:], "id": i} for i, x in enumerate(asked)],
    )


def alone(example: dict, draw: int = EIGENVALUE_DRAW) -> dict[str, Any]:
    """A batch of one example, without padding."""
    ids = torch.tensor([example["input_ids"]])
    return {
        "input_ids": ids,
        "labels": torch.tensor([example.get("labels", example["input_ids"])]),
        "attention_mask": torch.ones_like(ids),
        "index": torch.tensor([example["id"]]),
        "draw": draw,
    }


def gradients(model: nn.Module, layers: Sequence[Layer], loss: Tensor) -> dict[str, Tensor]:
    """[O,J] of every layer, by autograd on the parameters themselves."""
    owned = {x.name: own(model, x) for x in layers}
    unique = list({id(p): p for own in owned.values() for p in own}.values())
    found = torch.autograd.grad(loss, unique, allow_unused=True)
    by_id = {
        id(p): torch.zeros_like(p) if g is None else g for p, g in zip(unique, found, strict=True)
    }
    result = {}
    for x in layers:
        weight, *bias = (by_id[id(p)] for p in owned[x.name])
        if x.expert is not None:
            weight, *bias = (g[x.expert] for g in (weight, *bias))
            weight = weight if weight.shape == (x.O, x.I) else weight.T
        elif not isinstance(model.get_submodule(x.name), nn.Linear):
            weight = weight.T
        result[x.name] = torch.cat([weight, *(b.unsqueeze(1) for b in bias)], 1)
    return result


def moments(
    model: nn.Module, layers: Sequence[Layer], loss: Callable[[], Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """sum a a^T and sum g g^T of every layer in one sequence, by plain hooks; of experts, by the
    products of the model's own code.
    """
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {x.name: [] for x in layers}

    def hook_of(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            x = args[0] if args else next(iter(kwargs.values()))
            product = output if isinstance(output, Tensor) else product_of(module, x, output)
            if product.requires_grad:
                seen[name].append((x.detach().clone(), product))
                # The model may go on to change it in place.
                return output.clone() if output is product else output
            return output

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(hook_of(x.name), with_kwargs=True)
        for x in layers
        if x.expert is None
        for name in (x.name, *x.also)
    ]
    with Slices(model, [x for x in layers if x.expert is not None], seen):
        value = loss()
    for handle in handles:
        handle.remove()
    outputs = [output for uses in seen.values() for _, output in uses]
    found = iter(torch.autograd.grad(value, outputs, allow_unused=True))
    result = {}
    for x in layers:
        A, S = 0, 0
        for a, output in seen[x.name]:
            g = next(found)
            if not a.is_floating_point():
                # An embedding: its gradient is that of W^T, and of the rows that a loss reaches.
                rows = nn.functional.one_hot(a.flatten(), x.O).to(output.dtype)
                inputs = g.reshape(-1, x.I)
                a, g = inputs, rows * (inputs != 0).any(1, keepdim=True)
            a = a.reshape(-1, x.I)
            a = torch.cat([a, a.new_ones(len(a), 1)], 1) if x.bias else a
            g = output.new_zeros(0, x.O) if g is None else g.reshape(-1, x.O)
            A, S = A + a.T @ a, S + g.T @ g
        result[x.name] = (A, S)
    return result


def product_of(module: nn.Module, x: Tensor, outputs: Any) -> Tensor:
    """Which of the tensors of a router's outputs is W x + b."""
    expected = nn.functional.linear(x, module.weight, module.bias)
    return next(
        t
        for t in (outputs.values() if isinstance(outputs, Mapping) else outputs)
        if t.shape == expected.shape and torch.allclose(t, expected.to(t.dtype), rtol=1e-3)
    )


# Of the largest in any layer: a gradient that cancels to nothing is not compared with its rounding.
ROUNDING = 1e-9


def relative(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """Of every (found, expected) the largest difference over the largest value expected."""
    sizes = [expected.abs().max().item() for _, expected in pairs]
    least = ROUNDING * max(sizes) or 1.0
    return [
        (found.double() - expected.double()).abs().max().item() / max(size, least)
        for (found, expected), size in zip(pairs, sizes, strict=True)
    ]


def errors(
    model: nn.Module,
    layers: list[Layer],
    wanted: list[str] | None,
    shared: bool = False,
    single: bool = False,
) -> dict[str, Any]:
    """Largest relative errors of covariances and eigenvalues, and of scores."""
    data, asked = examples(family_models.VOCABULARY)
    task = LanguageModelTask()
    more: Any = {"task": task, "batch_tokens": 1 if single else BATCH_TOKENS}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        factors = fit(
            model, data, out=f"{folder}/f", layers=wanted, shared_parameters=shared, **more
        )
        prepared = prepare_queries(model, factors, asked, rank=None, **more)
        found = torch.tensor(score(model, prepared, data, out=f"{folder}/s", **more).matrix)
        sides = [
            factors.stored(f"{side}_covariance.safetensors") for side in ("activation", "gradient")
        ]

    model.requires_grad_(True)  # what is frozen has a gradient as well
    every, layers = layers, [x for x in layers if x.name in factors]

    def ekfac(loss_of: Callable[[dict], Tensor], batches: list[dict]) -> list[dict[str, Tensor]]:
        """Per-sample gradients in the eigenbasis."""
        each = (gradients(model, layers, loss_of(batch)) for batch in batches)
        return [
            {n: factors[n].Qg.T.to(g) @ g @ factors[n].Qa.to(g) for n, g in one.items()}
            for one in each
        ]

    sums = [
        moments(
            model,
            every,
            lambda e=e: task.compute_train_loss(alone(e, COVARIANCE_DRAW), model, sample=True),
        )
        for e in data
    ]
    # Experts are left out where no token comes, and nowhere else.
    for x in every:
        if x.name not in factors and any(isinstance(one[x.name][0], Tensor) for one in sums):
            raise AssertionError(f"{x.name} has been left out")
    sampled = ekfac(lambda b: task.compute_train_loss(b, model, sample=True), [*map(alone, data)])
    train = ekfac(lambda b: task.compute_train_loss(b, model), [*map(alone, data)])
    asked_for = ekfac(lambda b: task.compute_measurement(b, model), [*map(alone, asked)])
    scores = torch.zeros(found.shape, dtype=torch.float64)
    lam = {
        x.name: sum(one[x.name].double().square() for one in sampled) / len(data) for x in layers
    }
    for n in lam:
        P = torch.stack([one[n] for one in asked_for]).double()
        P = P / (lam[n] + max(0.1 * lam[n].mean().item(), 1e-8))
        G = torch.stack([one[n] for one in train]).double()
        scores += torch.einsum("qoj,boj->qb", P, G)
    covariances = (
        relative([(sides[side][n], sum(one[n][side] for one in sums)) for n in lam])
        for side in (0, 1)
    )
    eigenvalues = relative([(factors[n].lam, lam[n]) for n in lam])
    by_layer = [max(each) for each in zip(*covariances, eigenvalues, strict=True)]
    return {
        "factors": max(by_layer),
        "worst_layer": [*lam][by_layer.index(max(by_layer))],
        "scores": relative([(found, scores)])[0],
    }


# Layers of which no gradient of ours could be right are refused by name, and then left out.
LEFT_OUT = re.compile(r"^layer (\S+) .*leave it out of `layers`$", re.DOTALL)


def attempt(
    make: Callable[[], nn.Module], dtype: torch.dtype, wanted: list[str] | None
) -> dict[str, Any]:
    """One choice of layers: what was chosen, and errors or the refusal.

    Of layers asked for by name, kinds that are refused are left out one after the other.
    """
    row: dict[str, Any] = {"left_out": {}, "shared": False, "alone": False}
    model, layers = make().to(dtype), []
    while True:
        try:
            layers = select_layers(model, wanted, shared=row["shared"])
            sizes = [x.O * x.J for x in layers]
            row |= {
                "layers": len(layers),
                "kinds": sorted({kind(x.name) for x in layers}),
                "share": sum(sizes) / sum(p.numel() for p in model.parameters()),
            }
            found = errors(model, layers, wanted, row["shared"], row["alone"])
        except Error as error:
            if "batch_tokens=1" in str(error) and not row["alone"]:
                row["alone"] = True
                continue
            if "shared_parameters=True" in str(error) and not row["shared"]:
                row["shared"] = True
                continue
            refused = LEFT_OUT.match(str(error))
            if wanted is None or not refused or not layers:
                return row | {"refused": f"{type(error).__name__}: {error}"}
            row["left_out"][kind(refused[1])] = str(error)
            wanted = [x.name for x in layers if kind(x.name) != kind(refused[1])]
            continue
        except TimeoutError:
            raise
        except Exception as error:
            return row | {"failed": f"{type(error).__name__}: {error}", "where": place(error)}
        return row | found | {"right": max(found["factors"], found["scores"]) < TOLERANCE[dtype]}


def kind(name: str) -> str:
    """A layer's name without its numbers."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def place(error: BaseException) -> str:
    """File and line where an error was raised."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else ""


def computes(model: nn.Module) -> bool:
    """Whether a padded batch gives finite logits of the model's own dtype."""
    data, _ = examples(family_models.VOCABULARY)
    short, long = data[0]["input_ids"], data[1]["input_ids"]
    ids = torch.tensor([long, short + [0] * (len(long) - len(short))])
    mask = torch.ones_like(ids)
    mask[1, len(short) :] = 0
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    return logits.dtype == next(model.parameters()).dtype and bool(logits.isfinite().all())


def family(name: str, model_type: str) -> dict[str, Any]:
    """The row of one class."""
    row: dict[str, Any] = {"class": name, "type": model_type, "torch": torch.__version__}
    row["transformers"] = transformers.__version__

    def make() -> nn.Module:
        return family_models.tiny(name, model_type)

    dtype = torch.float64
    try:
        model = make()
        try:
            double = computes(model.double())
        except (RuntimeError, TypeError):
            double = False
        if not double:
            dtype = torch.float32
            if not computes(make()):
                raise ValueError("its logits are not finite")
    except TimeoutError:
        raise
    except Exception as error:
        return row | {"not_built": f"{type(error).__name__}: {error}", "where": place(error)}
    row["dtype"] = str(dtype).removeprefix("torch.")
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row["default"] = attempt(make, dtype, None)
    if "refused" in row["default"]:
        names = [n for n in linear_layers(model) if ATTENTION.search(n) and not ROUTER.search(n)]
        if names:
            row["named"] = attempt(make, dtype, names)
    row["all"] = {k: x for k, x in attempt(make, dtype, ["all"]).items() if k != "kinds"}
    return row


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """TimeoutError when a block takes longer."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", help="names of classes")
    parser.add_argument("--out", type=Path, help="JSON lines")
    parser.add_argument("--table", type=Path, help="write docs/models.md from these lines")
    arguments = parser.parse_args()
    if arguments.table:
        rows = [json.loads(text) for text in arguments.table.read_text().splitlines()]
        write(rows)
        return
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    out = arguments.out.open("w") if arguments.out else None
    for name, model_type in family_models.classes():
        if arguments.only and name not in arguments.only:
            continue
        start = time.perf_counter()
        try:
            with limit(SECONDS):
                row = family(name, model_type)
        except TimeoutError as error:
            row = {"class": name, "type": model_type, "not_built": str(error)}
        print(f"{outcome(row):10} {name} {time.perf_counter() - start:.2f} s", flush=True)
        if arguments.only:
            json.dump(row, sys.stdout, indent=1)
        if out:
            out.write(json.dumps(row) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
