"""Models, tasks and the harness of the A/B tests: kronfluence itself beside the backend.

Both sides read the same files: each stage starts from kronfluence's own results of the stage
before, so that a difference is one of this stage.
"""

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
import torch
from kronfluence import Analyzer, FactorArguments, ScoreArguments, Task, prepare_model
from torch import Tensor, nn
from torch.nn import functional as F

import ekfac_fast.kronfluence as fast
from ekfac_fast.kronfluence import options as switched

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.GradScaler.*:FutureWarning")

FLOATS = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}


class Sequence(nn.Module):
    """Linears over [B,T,I] (or [B,I]): nothing mixes tokens, so T and masks can be anything."""

    def __init__(self, sizes: tuple[int, ...], bias: tuple[bool, ...], inplace: bool) -> None:
        super().__init__()
        shapes = zip(sizes[:-1], sizes[1:], bias, strict=True)
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=b) for i, o, b in shapes)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            read = x * 1.0
            x = torch.tanh(layer(read))
            if self.inplace:
                # The tracker has to have kept what the layer read.
                read.mul_(3.0)
        return x


class Siblings(nn.Module):
    """Three linears that read one tensor, one that is called twice, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.q, self.k, self.v = (nn.Linear(12, 12, bias=b) for b in (True, False, True))
        self.shared = nn.Linear(12, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2)
        x = torch.tanh(self.q(x)) * self.k(x) + self.v(x)
        x = self.shared(torch.tanh(self.shared(x)))
        return self.head(x)


class SumLoss(Task):
    """Sum of squared errors over all outputs, weighted by the mask; labels sampled N(output, 1)."""

    def __init__(self, masked: bool = False, modules: list[str] | None = None) -> None:
        self.masked = masked
        self.modules = modules

    def compute_train_loss(self, batch: tuple, model: nn.Module, sample: bool = False) -> Tensor:
        x, y, mask = batch
        output = model(x)
        if sample:
            y = output.detach() + torch.randn_like(output)
        error = (output - y).square()
        return (error * mask.unsqueeze(-1)).sum() / 2 if self.masked else error.sum() / 2

    def compute_measurement(self, batch: tuple, model: nn.Module) -> Tensor:
        return model(batch[0]).sin().sum()

    def get_attention_mask(self, batch: tuple) -> Tensor | None:
        return batch[2] if self.masked else None

    def get_influence_tracked_modules(self) -> list[str] | None:
        return self.modules


class Halved(SumLoss):
    """Post-processes gradients, which only kronfluence's own path can do."""

    enable_post_process_per_sample_gradient = True

    def post_process_per_sample_gradient(self, module_name: str, gradient: Tensor) -> Tensor:
        return gradient / 2


def language_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        attn_implementation="eager",
    )
    torch.manual_seed(5)
    return LlamaForCausalLM(config).to(dtype)


class NextToken(Task):
    """Summed next-token loss of a causal language model with padding; labels sampled from it."""

    def compute_train_loss(self, batch: tuple, model: nn.Module, sample: bool = False) -> Tensor:
        ids, _, mask = batch
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
        labels = ids[:, 1:].flatten()
        if sample:
            with torch.no_grad():
                labels = torch.multinomial(logits.double().softmax(-1), 1).flatten()
        labels = labels.masked_fill(mask[:, 1:].flatten() == 0, -100)
        return F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)

    def compute_measurement(self, batch: tuple, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_attention_mask(self, batch: tuple) -> Tensor:
        return batch[2]

    def get_influence_tracked_modules(self) -> list[str]:
        names = ["q_proj", "k_proj", "v_proj", "o_proj"]
        attention = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in names]
        names = ["gate_proj", "up_proj", "down_proj"]
        return attention + [f"model.layers.{i}.mlp.{name}" for i in range(2) for name in names]


class Examples(torch.utils.data.Dataset):
    """`size` examples (x, y, mask); the mask is 1, except for a tail of every second example."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y
        self.mask = torch.ones(y.shape[: max(y.ndim - 1, 1)], dtype=torch.int64)
        if self.mask.ndim > 1:
            self.mask[::2, -(self.mask.shape[1] // 3 + 1) :] = 0
            self.mask[:, 0] = 1

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.x[index], self.y[index], self.mask[index]


def examples(size: int, x: tuple[int, ...], y: tuple[int, ...], dtype=torch.float32) -> Examples:
    return Examples(torch.randn(size, *x).to(dtype), torch.randn(size, *y).to(dtype))


def texts(size: int, tokens: int = 11) -> Examples:
    ids = torch.randint(1, 61, (size, tokens))
    made = Examples(ids, ids.unsqueeze(-1))
    return made


@dataclass
class Pair:
    """One prepared model and dataset in one folder, run with and without the backend."""

    model: nn.Module
    task: Task
    train: Examples
    query: Examples
    folder: Path
    factor_args: FactorArguments = field(default_factory=FactorArguments)
    batch: int = 4
    query_batch: int = 2

    def __post_init__(self) -> None:
        self.model = prepare_model(self.model, self.task)
        self.analyzer = Analyzer(
            "ab", self.model, self.task, cpu=True, disable_tqdm=True, output_dir=str(self.folder)
        )

    @contextlib.contextmanager
    def side(self, backend: bool, **options) -> Iterator[None]:
        """The same draws on both sides; the backend on or off."""
        torch.manual_seed(11)
        with fast.enabled(**options) if backend else contextlib.nullcontext():
            yield

    def covariances(self, backend: bool, name: str) -> dict[str, dict[str, Tensor]]:
        with self.side(backend):
            self.analyzer.fit_covariance_matrices(
                name, self.train, per_device_batch_size=self.batch, factor_args=self.factor_args
            )
        return self.analyzer.load_covariance_matrices(name)

    def eigen(self, backend: bool, name: str, source: str) -> dict[str, dict[str, Tensor]]:
        with self.side(backend):
            self.analyzer.perform_eigendecomposition(
                name,
                factor_args=self.factor_args,
                load_from_factors_name=None if name == source else source,
            )
        return self.analyzer.load_eigendecomposition(name)

    def eigenvalues(self, backend: bool, name: str, source: str) -> dict[str, dict[str, Tensor]]:
        with self.side(backend):
            self.analyzer.fit_lambda_matrices(
                name,
                self.train,
                per_device_batch_size=self.batch,
                factor_args=self.factor_args,
                load_from_factors_name=None if name == source else source,
            )
        return self.analyzer.load_lambda_matrices(name)

    def fit(self, backend: bool, name: str) -> None:
        """Every factor that the strategy needs, each stage from the same draws."""
        self.covariances(backend, name)
        self.eigen(backend, name, name)
        self.eigenvalues(backend, name, name)

    def pairwise(
        self, backend: bool, factors: str, args: ScoreArguments, name: str, **options
    ) -> dict[str, Tensor]:
        name = f"{name}_{'fast' if backend else 'stock'}"
        with self.side(backend, **options):
            self.analyzer.compute_pairwise_scores(
                name,
                factors,
                self.query,
                self.train,
                per_device_query_batch_size=self.query_batch,
                per_device_train_batch_size=self.batch,
                score_args=args,
                overwrite_output_dir=True,
            )
        return self.analyzer.load_pairwise_scores(name)

    def self_scores(
        self, backend: bool, factors: str, args: ScoreArguments, name: str
    ) -> dict[str, Tensor]:
        name = f"{name}_{'fast' if backend else 'stock'}"
        with self.side(backend):
            self.analyzer.compute_self_scores(
                name,
                factors,
                self.train,
                per_device_train_batch_size=self.batch,
                score_args=args,
                overwrite_output_dir=True,
            )
        return self.analyzer.load_self_scores(name)


@pytest.fixture(autouse=True)
def switched_off() -> Iterator[None]:
    """A test that imports this ends with the backend off."""
    with quick_release():
        yield
    fast.disable()
    assert switched.current() is None


def small_pair(folder: Path, task: SumLoss | None = None, **choices) -> Pair:
    torch.manual_seed(0)
    model = Sequence((5, 6, 4), (True, False), inplace=False)
    data = examples(9, (3, 5), (3, 4)), examples(7, (3, 5), (3, 4))
    return Pair(model, task or SumLoss(), *data, folder, FactorArguments(**choices))


def distance(x: Tensor, y: Tensor) -> float:
    """Relative error of x against y, in the Frobenius norm."""
    assert x.shape == y.shape
    x, y = x.double(), y.double()
    scale = y.norm()
    return float((x - y).norm() / scale) if scale > 0 else float(x.norm())


def spearman(x: Tensor, y: Tensor) -> float:
    """Rank correlation of all scores."""
    ranks = torch.stack([s.double().flatten().argsort().argsort().double() for s in (x, y)])
    return float(torch.corrcoef(ranks)[0, 1])


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Same names, shapes and dtypes; relative error within `tolerance`."""
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        if expected[name].is_floating_point():
            assert distance(found[name], expected[name]) <= tolerance, name
        else:
            torch.testing.assert_close(found[name], expected[name])


@contextlib.contextmanager
def quick_release() -> Iterator[None]:
    """kronfluence collects garbage and resets torch.compile all the time: not here, for speed."""
    with mock.patch.object(gc, "collect"), mock.patch.object(torch.compiler, "reset"):
        yield


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with quick_release():
        yield


def test_the_harness_sees_a_difference(tmp_path: Path) -> None:
    pair = Pair(
        Sequence((5, 4, 3), (True, False), inplace=False),
        SumLoss(),
        examples(8, (3, 5), (3, 3)),
        examples(4, (3, 5), (3, 3)),
        tmp_path,
    )
    cov = pair.covariances(False, "stock")["activation_covariance"]
    with pytest.raises(AssertionError):
        assert_close({k: v * 1.001 for k, v in cov.items()}, cov, 1e-5)
    assert spearman(torch.arange(9.0), torch.arange(9.0)) == pytest.approx(1)
