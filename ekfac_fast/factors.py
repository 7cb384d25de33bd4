"""EK-FAC factors of a model: covariances (Eq. 16), their eigenvectors, corrected eigenvalues (Eq.
20).

Two passes over the data with labels sampled from the model. The first sums activation and gradient
covariances per token; the second, in their eigenbasis, sums squared gradients per sequence. Files
have kronfluence's names and layout, so factors travel both ways.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .batches import Batches, autocasting, model_fingerprint
from .data import Indexable
from .hooks import Capture, Layer, LayerBatch, SharedRotation, select_layers
from .ops.shapes import wide
from .store import Store, StoreError, load_tensors, save_json, save_tensors
from .tasks import LanguageModelTask, Task

HEURISTIC_DAMPING = 0.1
Progress = Callable[[str, int, int], None]
ops = torch.ops.ekfac_fast


@dataclass(frozen=True)
class LayerFactors:
    """Qa [J,J], Qg [O,O] with eigenvectors in columns, and lam [O,J], the mean over sequences.

    Raises:
        ValueError: shapes disagree, or a value is not finite; names the layer.
    """

    name: str
    Qa: Tensor
    Qg: Tensor
    lam: Tensor

    def __post_init__(self) -> None:
        (O, J), a, g = self.lam.shape, tuple(self.Qa.shape), tuple(self.Qg.shape)
        if a != (J, J) or g != (O, O):
            raise ValueError(
                f"layer {self.name}: lam is [{O},{J}] but Qa is {list(a)} and Qg is {list(g)}; "
                "expected lam [O,J], Qa [J,J], Qg [O,O]"
            )
        for name in ("Qa", "Qg", "lam"):
            if not torch.isfinite(getattr(self, name)).all():
                raise ValueError(f"layer {self.name}: {name} holds NaN or infinity; fit it again")

    def damping(self, absolute: float | None = None) -> float:
        """`absolute`, or a tenth of the mean eigenvalue."""
        return HEURISTIC_DAMPING * self.lam.mean().item() if absolute is None else absolute


class Factors(Mapping[str, LayerFactors]):
    """The factors of every layer, read from a folder written by `fit` (or by kronfluence)."""

    def __init__(self, folder: str | Path):
        """Open a factor folder; layers are read when first asked for.

        Raises:
            StoreError: a file is missing or damaged; names it.
        """
        self.folder = Path(folder)
        counts = load_tensors(self.folder / "num_lambda_processed.safetensors")
        self.sequences = int(next(iter(counts.values())))
        tokens = load_tensors(self.folder / "num_activation_covariance_processed.safetensors")
        self.tokens = int(next(iter(tokens.values())))
        self._names = tuple(counts)

    @cached_property
    def _layers(self) -> dict[str, LayerFactors]:
        files = {
            part: load_tensors(self.folder / f"{part}.safetensors")
            for part in ("activation_eigenvectors", "gradient_eigenvectors", "lambda_matrix")
        }
        for part, tensors in files.items():
            if missing := set(self._names) - set(tensors):
                raise StoreError(
                    f"{self.folder / part}.safetensors has no layer {min(missing)}; fit again"
                )
        Qa, Qg, lam = files.values()
        count = self.sequences
        return {n: LayerFactors(n, Qa[n], Qg[n], lam[n] / count) for n in self._names}

    def __getitem__(self, name: str) -> LayerFactors:
        return self._layers[name]

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def layers(self, model: nn.Module) -> list[Layer]:
        """The model's layers that these factors belong to.

        Raises:
            ValueError: the model has no such layer, or one of another size; names it.
        """
        layers = select_layers(model, list(self._names))
        for layer in layers:
            lam = self[layer.name].lam
            if tuple(lam.shape) != (layer.O, layer.J):
                raise ValueError(
                    f"layer {layer.name} is [{layer.O},{layer.J}] in the model but the factors in "
                    f"{self.folder} are {list(lam.shape)}: they belong to another model"
                )
        return layers


def fit(
    model: nn.Module,
    dataset: Indexable,
    *,
    out: str | Path,
    task: Task | None = None,
    layers: str | list[str] | None = None,
    batch_tokens: int | None = None,
    batch_size: int | None = None,
    on_long: Literal["truncate", "refuse"] = "truncate",
    max_examples: int | None = None,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Factors:
    """Fit the EK-FAC factors of `model` on `dataset` into the folder `out`; continue if it was
    begun.

    Args:
        model: any module with `nn.Linear` (or Hugging Face `Conv1D`) layers.
        dataset: indexable examples; see `Batches`.
        out: the factor folder; kronfluence reads it as `factors_<name>`.
        task: None for `LanguageModelTask(seed)`.
        layers: names, globs, "mlp", "all"; None for the task's list, else "mlp".
        batch_tokens: budget of a batch for language models (default 4096); `batch_size` for others.
        on_long: what becomes of examples longer than the model has positions.
        max_examples: use the first so many.
        seed: of the sampled labels.
        autocast: dtype of the model's passes; sums stay fp32.
        progress: called with (stage, done, total) tokens.

    Raises:
        StoreError: `out` was begun with another model, data set or setting; names each difference.
        ValueError: a loss or a covariance is not finite; names the examples or the layer.
    """
    task = task or LanguageModelTask(seed)
    tracked = select_layers(model, layers or task.get_influence_tracked_modules())
    batches = Batches(
        dataset,
        model,
        batch_tokens=batch_tokens,
        batch_size=batch_size,
        max_examples=max_examples,
        on_long=on_long,
    )
    facts = {
        "model": model_fingerprint(model),
        "data": batches.fingerprint(),
        "examples": batches.size,
        "task": type(task).__qualname__,
        "layers": [layer.name for layer in tracked],
        "batch_tokens": batches.batch_tokens if batches.language else None,
        "batch_size": None if batches.language else batches.batch_size,
        "seed": seed,
        "autocast": str(autocast),
    }
    with Store.open(out, kind="factors", facts=facts) as store:
        if not store.finished:
            _Fit(model, task, tracked, batches, store, autocast, progress).run()
    return Factors(out)


class _Fit:
    """One run of `fit`: its passes and their saved states."""

    def __init__(self, model, task, layers, batches, store, autocast, progress):
        self.model, self.task, self.layers, self.batches = model, task, layers, batches
        self.store, self.autocast, self.progress = store, autocast, progress
        self.capture = Capture(model, layers)
        self.device = batches.device
        self.wide = wide(next(model.parameters()).dtype)

    def run(self) -> None:
        plan = self.store.plan(self.batches.plan)
        if not (self.store.folder / "gradient_eigenvalues.safetensors").exists():
            self._covariances(plan)
            self._eigendecompositions()
        self._eigenvalues(plan)
        save_json(self.store.folder / "factor_arguments.json", _kronfluence_arguments())
        self.store.finish(
            sequences=self.batches.size,
            truncated=self.batches.truncated,
            edge_draws=getattr(self.task, "edge_draws", 0),
        )
        for name in ("covariance", "eigenvalue"):
            (self.store.folder / f"{name}_state.safetensors").unlink(missing_ok=True)

    def _pass(self, name: str, plan: list[list[int]], sums: dict[str, Tensor], consume) -> None:
        """Sum over all batches into `sums`, from the last saved state on."""
        start, saved = self.store.load_state(f"{name}_state") or (0, {})
        for key, value in saved.items():
            sums[key] = value.to(self.device)
        total = sum(map(self.batches.tokens, plan))
        done = sum(map(self.batches.tokens, plan[:start]))
        for number, indices in enumerate(plan[start:], start + 1):
            batch = self.batches.load(indices)

            def loss(batch=batch) -> Tensor:
                with autocasting(self.device, self.autocast):
                    return self.task.compute_train_loss(batch=batch, model=self.model, sample=True)

            value = self.capture(loss, lambda seen, batch=batch: consume(seen, batch))
            if not torch.isfinite(value):
                raise ValueError(
                    f"the training loss is {value.item()} for examples {indices[:8]}"
                    f"{'...' if len(indices) > 8 else ''}; look at them, or at the model's weights"
                )
            done += self.batches.tokens(indices)
            if self.progress:
                self.progress(name, done, total)
            if self.store.due or number == len(plan):
                self.store.save_state(number, sums, f"{name}_state")

    def _covariances(self, plan: list[list[int]]) -> None:
        sums: dict[str, Tensor] = {}
        shared: dict[str, str] = dict(self.store.state.get("shared", {}))

        def add(key: str, x: Tensor, mask: Tensor | None, bias: bool) -> None:
            rows = x.flatten(0, 1)
            J = rows.shape[1] + bias
            if key not in sums:
                sums[key] = torch.zeros(J, J, dtype=self.wide, device=rows.device)
                sums[f"n {key}"] = torch.zeros((), dtype=torch.int64, device=rows.device)
            ops.covariance(sums[key], rows, mask, bias)
            sums[f"n {key}"] += len(rows) if mask is None else mask.sum()

        def consume(seen: LayerBatch, batch: Any) -> None:
            layer, mask = seen.layer, self._mask(seen, batch)
            # Which layers share an input is the same in every batch.
            if layer.name not in shared:
                shared[layer.name] = seen.shared
                if len(shared) == len(self.layers):
                    self.store.update(shared=shared)
            if seen.shared == layer.name:
                add(f"A {layer.name}", seen.a, mask, layer.bias)
            # As kronfluence does: gradients are not masked, but counted like activations.
            add(f"S {layer.name}", seen.g, None, False)
            if mask is not None:
                sums[f"n S {layer.name}"] += mask.sum() - mask.numel()

        self._pass("covariance", plan, sums, consume)
        sides = {
            "activation": {layer.name: f"A {shared[layer.name]}" for layer in self.layers},
            "gradient": {layer.name: f"S {layer.name}" for layer in self.layers},
        }
        folder = self.store.folder
        for side, keys in sides.items():
            # safetensors stores no aliases: a shared covariance is written under every layer's
            # name.
            save_tensors(
                folder / f"{side}_covariance.safetensors",
                {name: sums[key].cpu().clone() for name, key in keys.items()},
            )
            save_tensors(
                folder / f"num_{side}_covariance_processed.safetensors",
                {name: sums[f"n {key}"].cpu().reshape(1).clone() for name, key in keys.items()},
            )

    def _mask(self, seen: LayerBatch, batch: Any) -> Tensor | None:
        """Real positions of a layer's rows, flat, or None where every row is real."""
        mask = self.task.get_attention_mask(batch=batch)
        if isinstance(mask, Mapping):
            mask = mask.get(seen.layer.name)
        rows = seen.a.shape[0] * seen.a.shape[1]
        if mask is None or (mask.numel() != rows and seen.a.shape[1] == 1):
            return None
        if mask.numel() != rows:
            raise ValueError(
                f"layer {seen.layer.name} sees {rows} rows but the attention mask is "
                f"{list(mask.shape)}; give a mapping from layer names to masks"
            )
        return mask.flatten().bool()

    def _eigendecompositions(self) -> None:
        folder, shared = self.store.folder, self.store.state["shared"]
        work: list[tuple[str, str, Tensor]] = []
        for side in ("activation", "gradient"):
            sums = load_tensors(folder / f"{side}_covariance.safetensors")
            counts = load_tensors(folder / f"num_{side}_covariance_processed.safetensors")
            for name, matrix in sums.items():
                if side == "gradient" or shared[name] == name:
                    work.append((side, name, matrix.double() / max(1, int(counts[name]))))
        work.sort(key=lambda item: -len(item[2]))  # largest first: memory shows at once
        found: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        total, done = sum(len(m) ** 3 for *_, m in work), 0
        for side, name, matrix in work:
            values, vectors = eigendecomposition(matrix.to(self.device), f"{name} ({side})")
            found[side, name] = values.to(self.wide).cpu(), vectors.to(self.wide).cpu()
            done += len(matrix) ** 3
            if self.progress:
                self.progress("eigendecomposition", done, total)
        for side in ("activation", "gradient"):
            owners = {
                x.name: shared[x.name] if side == "activation" else x.name for x in self.layers
            }
            for at, part in ((1, "eigenvectors"), (0, "eigenvalues")):
                save_tensors(
                    folder / f"{side}_{part}.safetensors",
                    {name: found[side, owner][at].clone() for name, owner in owners.items()},
                )

    def _eigenvalues(self, plan: list[list[int]]) -> None:
        folder = self.store.folder
        Qa = load_tensors(folder / "activation_eigenvectors.safetensors")
        Qg = load_tensors(folder / "gradient_eigenvectors.safetensors")
        owners = self.store.state["shared"]
        # One copy of what is shared, in memory as on the device.
        held = {owner: Qa[owner].to(self.device) for owner in set(owners.values())}
        Qg = {name: q.to(self.device) for name, q in Qg.items()}
        sums = {
            x.name: torch.zeros(x.O, x.J, dtype=self.wide, device=self.device) for x in self.layers
        }
        rotate = SharedRotation()

        def consume(seen: LayerBatch, _: Any) -> None:
            name, dtype = seen.layer.name, seen.g.dtype
            a, q, bias = rotate(seen, held[owners[name]])
            q = q if q is None else q.to(dtype)
            ops.eigenvalues(sums[name], seen.g, a, Qg[name].to(dtype), q, bias)

        self._pass("eigenvalue", plan, sums, consume)
        sums.pop("batches", None)
        save_tensors(folder / "lambda_matrix.safetensors", {n: x.cpu() for n, x in sums.items()})
        count = torch.tensor([self.batches.size])
        save_tensors(folder / "num_lambda_processed.safetensors", {n: count.clone() for n in sums})


def eigendecomposition(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending, clamped at 0) and eigenvectors (columns) of a covariance, in fp64.

    Where `eigh` does not converge, the singular value decomposition of the same symmetric matrix is
    taken: slower, and robust.

    Raises:
        ValueError: the matrix holds NaN or infinity; names `name`.
    """
    if not torch.isfinite(matrix).all():
        raise ValueError(
            f"the covariance of {name} holds NaN or infinity; were losses and activations finite?"
        )
    matrix = matrix.double()
    matrix = (matrix + matrix.mT) / 2
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        vectors, values, _ = torch.linalg.svd(matrix)
        values, vectors = values.flip(-1), vectors.flip(-1)
    return values.clamp(min=0), vectors


def _kronfluence_arguments() -> dict[str, Any]:
    """`factor_arguments.json` as kronfluence writes it for these factors."""
    return {
        "strategy": "ekfac",
        "use_empirical_fisher": False,
        "amp_dtype": None,
        "amp_scale": 2.0**16,
        "has_shared_parameters": False,
        "covariance_max_examples": None,
        "covariance_data_partitions": 1,
        "covariance_module_partitions": 1,
        "activation_covariance_dtype": "torch.float32",
        "gradient_covariance_dtype": "torch.float32",
        "eigendecomposition_dtype": "torch.float64",
        "lambda_max_examples": None,
        "lambda_data_partitions": 1,
        "lambda_module_partitions": 1,
        "use_iterative_lambda_aggregation": False,
        "offload_activations_to_cpu": False,
        "per_sample_gradient_dtype": "torch.float32",
        "lambda_dtype": "torch.float32",
    }
