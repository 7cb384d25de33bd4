"""The ways a script may run its model: compiled, checkpointed, on several processes."""

import os
import socket
from pathlib import Path

import pytest
import torch
from kronfluence import Analyzer, FactorArguments, ScoreArguments, Task, prepare_model
from kronfluence.module import TrackedModule
from kronfluence.module.linear import TrackedLinear
from kronfluence.module.utils import set_gradient_scale
from kronfluence.utils.state import State
from test_kronfluence_cases import (
    Examples,
    Pair,
    Sequence,
    Siblings,
    SumLoss,
    assert_close,
    examples,
    pytestmark,  # noqa: F401
    quick_release,
)
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.checkpoint import checkpoint

import ekfac_fast.kronfluence as fast


@pytest.fixture(autouse=True)
def _quick():
    with quick_release():
        yield


def everything(analyzer: Analyzer, train, query) -> dict[str, Tensor]:
    """Factors and scores of all kinds, by name; batches of two."""
    args = FactorArguments(use_empirical_fisher=True)
    analyzer.fit_all_factors("f", train, per_device_batch_size=2, factor_args=args)
    kinds = {
        "full": {},
        "low rank": {"query_gradient_low_rank": 2, "use_full_svd": True},
        "per token": {"compute_per_token_scores": True},
        "query sum": {"aggregate_query_gradients": True},
        "train sum": {"aggregate_train_gradients": True},
    }
    found = {}
    for name, choices in kinds.items():
        args = ScoreArguments(damping_factor=None, **choices)
        analyzer.compute_pairwise_scores(name, "f", query, train, 2, 2, score_args=args)
        found[name] = analyzer.load_pairwise_scores(name)["all_modules"]
    for name, measured in (("self", False), ("measured", True)):
        args = ScoreArguments(damping_factor=None, use_measurement_for_self_influence=measured)
        analyzer.compute_self_scores(name, "f", train, 2, score_args=args)
        found[name] = analyzer.load_self_scores(name)["all_modules"]
    for kind, factors in analyzer.load_covariance_matrices("f").items():
        found |= {f"{kind} {module}": x for module, x in factors.items()}
    for kind, factors in analyzer.load_lambda_matrices("f").items():
        found |= {f"{kind} {module}": x for module, x in factors.items()}
    return found


def model_and_data() -> tuple[nn.Module, Task, tuple]:
    torch.manual_seed(0)
    model = Sequence((5, 8, 4), (True, False), inplace=False)
    return model, SumLoss(masked=True), (examples(11, (3, 5), (3, 4)), examples(7, (3, 5), (3, 4)))


def run(folder: Path, wrap=lambda model: model, cpu: bool = True) -> dict[str, Tensor]:
    model, task, data = model_and_data()
    model = wrap(prepare_model(model, task))
    analyzer = Analyzer("a", model, task, cpu=cpu, disable_tqdm=True, output_dir=str(folder))
    return everything(analyzer, *data)


# Dynamo looks at the gradients of what enters a graph, and torch remarks on it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_model(tmp_path: Path) -> None:
    expected = run(tmp_path / "stock")
    with fast.enabled():
        found = run(tmp_path / "fast", lambda model: torch.compile(model, backend="eager"))
    assert_close(found, expected, 1e-5)


def test_scaled_gradients(tmp_path: Path) -> None:
    """fp16 AMP scales the loss and tells the modules; here only the modules hear of it."""
    model, task, data = model_and_data()
    pair = Pair(model, task, *data, tmp_path, FactorArguments(use_empirical_fisher=True))
    set_gradient_scale(pair.model, 2.0**-3)
    expected = everything(pair.analyzer, *data)
    pair.analyzer.output_dir = tmp_path / "fast"
    pair.analyzer.output_dir.mkdir()
    with fast.enabled():
        found = everything(pair.analyzer, *data)
    assert_close(found, expected, 1e-5)


def test_convolutions_beside_linears(tmp_path: Path) -> None:
    """Scores of modules on both paths add up, in partitions as well."""
    torch.manual_seed(0)
    data = [Examples(torch.randn(n, 2, 4, 3), torch.randn(n, 3, 5)) for n in (7, 5)]
    task = SumLoss(modules=["conv", "q", "k", "head"])
    pair = Pair(Siblings(), task, *data, tmp_path, FactorArguments(use_empirical_fisher=True))
    pair.fit(False, "stock")
    for choices in (
        {},
        {"query_gradient_low_rank": 3, "use_full_svd": True, "module_partitions": 2},
        {"aggregate_query_gradients": True, "compute_per_module_scores": True},
        {"aggregate_train_gradients": True, "data_partitions": 2},
    ):
        args = ScoreArguments(damping_factor=None, **choices)
        expected = pair.pairwise(False, "stock", args, "mixed")
        assert_close(pair.pairwise(True, "stock", args, "mixed"), expected, 1e-5)
    for measured in (False, True):
        args = ScoreArguments(damping_factor=None, use_measurement_for_self_influence=measured)
        expected = pair.self_scores(False, "stock", args, "mixed")
        assert_close(pair.self_scores(True, "stock", args, "mixed"), expected, 1e-5)


def test_a_module_used_twice_unannounced(tmp_path: Path) -> None:
    """Without `has_shared_parameters` kronfluence counts the last use only, and so do we."""
    torch.manual_seed(0)
    data = [Examples(torch.randn(n, 2, 4, 3), torch.randn(n, 3, 5)) for n in (7, 5)]
    task = SumLoss(modules=["q", "shared", "head"])
    one = Pair(Siblings(), task, *data, tmp_path, FactorArguments(use_empirical_fisher=True))
    one.fit(False, "stock")
    found = one.covariances(True, "fast") | one.eigenvalues(True, "fast_lambda", "stock")
    for load in ("load_covariance_matrices", "load_lambda_matrices"):
        for name, expected in getattr(one.analyzer, load)("stock").items():
            assert_close(found[name], expected, 1e-5)
    args = ScoreArguments(damping_factor=None, compute_per_module_scores=True)
    for scores in (one.pairwise, one.self_scores):
        expected = scores(False, "stock", args, "twice")
        assert_close(scores(True, "stock", args, "twice"), expected, 1e-5)


class Doubled(nn.Linear):
    """A layer that kronfluence knows only because the script taught it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class TrackedDoubled(TrackedLinear):
    """The script's own class: its gradients are not those of `nn.Linear`."""

    def compute_per_sample_gradient(self, input_activation: Tensor, output_gradient: Tensor):
        return 2 * super().compute_per_sample_gradient(input_activation, output_gradient)


class Mixed(nn.Module):
    """Embedding and LayerNorm (never tracked), Conv2d and a class of the script's own, Linears."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.own = Doubled(20, 8)
        self.head = nn.Linear(8, 4, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.up(self.embedding(ids))))
        x = self.conv(x.unsqueeze(1)).transpose(1, 2).flatten(2)
        return self.head(torch.tanh(self.own(x)))


def test_every_module_takes_its_own_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TrackedModule.SUPPORTED_MODULES, Doubled, TrackedDoubled)
    torch.manual_seed(0)
    data = [Examples(torch.randint(11, (n, 5)), torch.randn(n, 5, 4)) for n in (7, 5)]
    args = FactorArguments(
        use_empirical_fisher=True, covariance_module_partitions=2, lambda_module_partitions=3
    )
    one = Pair(Mixed(), SumLoss(), *data, tmp_path, args)
    one.fit(False, "stock")
    one.fit(True, "fast")
    for load in ("load_covariance_matrices", "load_lambda_matrices"):
        expected, found = (getattr(one.analyzer, load)(name) for name in ("stock", "fast"))
        for name in expected:
            assert_close(found[name], expected[name], 1e-5)
    for choices in (
        {"module_partitions": 3},
        {"query_gradient_low_rank": 3, "compute_per_module_scores": True},
        {"aggregate_query_gradients": True, "aggregate_train_gradients": True},
        {"offload_activations_to_cpu": True, "data_partitions": 2},
    ):
        args = ScoreArguments(damping_factor=None, **choices)
        expected = one.pairwise(False, "stock", args, "mixed")
        assert_close(one.pairwise(True, "stock", args, "mixed"), expected, 1e-5)
    for measured in (False, True):
        args = ScoreArguments(
            damping_factor=None, use_measurement_for_self_influence=measured, module_partitions=2
        )
        expected = one.self_scores(False, "stock", args, "mixed")
        assert_close(one.self_scores(True, "stock", args, "mixed"), expected, 1e-5)
    rows = {(row.module, row.stage): row for row in fast.report().rows}
    paths = [rows[name, "lambda"].path for name in ("up", "conv", "head")]
    assert paths == ["ekfac_fast", "kronfluence", "ekfac_fast"]
    own = rows["own", "every stage"]
    assert own.path == "kronfluence"
    assert "TrackedDoubled is not one of kronfluence's own classes" in own.why


class Checkpointed(SumLoss):
    """Recomputes the forward pass in the backward pass."""

    def compute_train_loss(self, batch: tuple, model: nn.Module, sample: bool = False) -> Tensor:
        x, y, _ = batch
        output = checkpoint(model, x.clone().requires_grad_(), use_reentrant=False)
        return (output - y).square().sum()


def test_a_checkpointed_model(tmp_path: Path) -> None:
    """Inputs are seen twice, as kronfluence sees them; gradients once."""
    model, _, data = model_and_data()
    args = FactorArguments(use_empirical_fisher=True)
    pair = Pair(model, Checkpointed(), *data, tmp_path, args)
    expected, found = pair.covariances(False, "stock"), pair.covariances(True, "fast")
    for name in expected:
        assert_close(found[name], expected[name], 1e-5)
    pair.eigen(False, "stock", "stock")
    expected = pair.eigenvalues(False, "stock", "stock")
    found = pair.eigenvalues(True, "fast_eigenvalues", "stock")
    for name in expected:
        assert_close(found[name], expected[name], 1e-5)
    for scores in (pair.pairwise, pair.self_scores):
        args = ScoreArguments(damping_factor=None)
        expected = scores(False, "stock", args, "checkpoint")
        assert_close(scores(True, "stock", args, "checkpoint"), expected, 1e-5)


def one_of_two(rank: int, port: int, folder: str) -> None:
    """One process of a data-parallel run; gloo and the CPU stand in for NCCL and GPUs."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)

    def all_gather(output_tensor: Tensor, input_tensor: Tensor) -> None:
        parts = [torch.empty_like(input_tensor) for _ in range(2)]
        dist.all_gather(parts, input_tensor)
        output_tensor.copy_(torch.stack(parts))

    # kronfluence reduces on GPUs only; gloo gathers into lists only.
    torch.cuda.is_available = lambda: True
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_: None
    Tensor.cuda = lambda self, *_: self
    torch.distributed.all_gather_into_tensor = all_gather
    State._shared_state.update(
        cpu=True,
        num_processes=2,
        process_index=rank,
        local_process_index=rank,
        device=torch.device("cpu"),
        n_gpus=0,
    )
    with quick_release(), fast.enabled():
        found = run(Path(folder), nn.parallel.DistributedDataParallel, cpu=False)
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    """Uneven datasets over two processes: the results of kronfluence on one."""
    expected = run(tmp_path / "stock")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (port, str(tmp_path / "fast")), nprocs=2)
    found = torch.load(tmp_path / "fast" / "found.pt")
    assert_close(found, expected, 1e-5)
