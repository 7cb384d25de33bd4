"""Arguments that choose dtypes, autocast, masks and files: honoured as kronfluence honours them."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kronfluence import FactorArguments, ScoreArguments
from kronfluence.factor import covariance, eigen
from kronfluence.utils.common import factor_arguments, score_arguments
from safetensors import safe_open
from test_kronfluence_cases import (
    NextToken,
    Pair,
    Sequence,
    SumLoss,
    assert_close,
    distance,
    examples,
    language_model,
    pytestmark,  # noqa: F401
    quick_release,
    texts,
)
from torch import Tensor

LUCK = 1.25
FACTOR_DTYPES = (
    "activation_covariance_dtype",
    "gradient_covariance_dtype",
    "per_sample_gradient_dtype",
    "lambda_dtype",
)
SCORE_DTYPES = (
    "query_gradient_svd_dtype",
    "per_sample_gradient_dtype",
    "precondition_dtype",
    "score_dtype",
)


@pytest.fixture(autouse=True)
def _quick():
    with quick_release():
        yield


def pair(folder: Path, task: SumLoss | None = None, **choices) -> Pair:
    torch.manual_seed(8)
    model = Sequence((9, 14, 6), (True, False), inplace=False)
    data = examples(43, (5, 9), (5, 6)), examples(9, (5, 9), (5, 6))
    args = FactorArguments(use_empirical_fisher=True, **choices)
    return Pair(model, task or SumLoss(masked=True), *data, folder, args)


def in_fp64(args):
    """The same arguments with every product of the stage in fp64; the model is left as it is."""
    names = [field.name for field in dataclasses.fields(args) if field.name.endswith("_dtype")]
    return dataclasses.replace(args, **dict.fromkeys(set(names) - {"amp_dtype"}, torch.float64))


def assert_no_farther(
    found: dict[str, Tensor], stock: dict[str, Tensor], truth: dict[str, Tensor]
) -> None:
    """The dtypes of kronfluence, and no more error than it has, or than fp32 products have.

    Errors are taken over all modules, and `LUCK` allowed for: that of a few sums in bf16 is as much
    luck as precision (over many draws ours is 0.7 to 1.0 of the plain way's).
    """
    assert found.keys() == stock.keys() == truth.keys()
    ours, theirs = [], []
    for name, right in truth.items():
        assert found[name].dtype == stock[name].dtype
        if right.is_floating_point():
            ours.append(distance(found[name], right))
            theirs.append(distance(stock[name], right))
        else:
            assert torch.equal(found[name], right)
    most = max(LUCK * torch.tensor(theirs).norm(), 1e-5 * len(ours) ** 0.5)
    assert torch.tensor(ours).norm() <= most


def compare_factors(one: Pair) -> None:
    """Covariances and eigenvalues, from the same eigenvectors."""
    args = one.factor_args
    stock, found = one.covariances(False, "stock"), one.covariances(True, "fast")
    one.factor_args = in_fp64(args)
    truth = one.covariances(False, "truth")
    for name in truth:
        assert_no_farther(found[name], stock[name], truth[name])
    one.eigen(False, "truth", "truth")
    truth = one.eigenvalues(False, "truth", "truth")
    one.factor_args = args
    stock = one.eigenvalues(False, "stock_lambda", "truth")
    found = one.eigenvalues(True, "fast_lambda", "truth")
    for name in truth:
        assert_no_farther(found[name], stock[name], truth[name])


def compare_scores(scores: Callable[..., dict[str, Tensor]], args: ScoreArguments) -> None:
    """Scores from the factors named "truth"."""
    stock, found = (scores(side, "truth", args, "as_asked") for side in (False, True))
    truth = scores(False, "truth", in_fp64(args), "in_fp64")
    assert_no_farther(found, stock, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", FACTOR_DTYPES)
def test_each_dtype_of_the_factors(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    compare_factors(pair(tmp_path, **{name: dtype}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", SCORE_DTYPES)
def test_each_dtype_of_the_scores(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if name == "query_gradient_svd_dtype" and dtype == torch.bfloat16:
        pytest.skip("LAPACK has no bf16: kronfluence stops")
    one = pair(tmp_path)
    one.fit(False, "truth")
    for choices in ({}, {"query_gradient_low_rank": 3, "use_full_svd": True}):
        compare_scores(one.pairwise, ScoreArguments(None, **choices, **{name: dtype}))
    for measured in (False, True):
        args = ScoreArguments(None, use_measurement_for_self_influence=measured, **{name: dtype})
        compare_scores(one.self_scores, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_of_the_eigendecomposition(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = pair(tmp_path, eigendecomposition_dtype=dtype)
    one.covariances(False, "stock")
    inner, seen = torch.linalg.eigh, set()

    def watched(matrices: Tensor) -> tuple[Tensor, Tensor]:
        seen.add(matrices.dtype)
        return inner(matrices)

    monkeypatch.setattr(torch.linalg, "eigh", watched)
    found = one.eigen(True, "fast", "stock")
    assert seen == {dtype}
    expected = one.eigen(False, "stock", "stock")
    for side in ("activation", "gradient"):
        assert_close(found[f"{side}_eigenvalues"], expected[f"{side}_eigenvalues"], 1e-5)


PRESETS = ("smart_low_precision", "all_low_precision", "reduce_memory", "extreme_reduce_memory")


@pytest.mark.parametrize("preset", PRESETS)
def test_low_precision_presets_are_no_farther_from_fp64(preset: str, tmp_path: Path) -> None:
    """bf16 autocast, offloading, partitions; fp64 is of the products, from the same gradients."""
    factor_args = getattr(factor_arguments, f"{preset}_factor_arguments")()
    factor_args.use_empirical_fisher = True
    torch.manual_seed(3)
    one = Pair(language_model(), NextToken(), texts(12), texts(5), tmp_path, factor_args, batch=2)
    compare_factors(one)
    scores = getattr(score_arguments, f"{preset}_score_arguments")
    compare_scores(one.pairwise, scores(None))
    args = scores(None, query_gradient_low_rank=4)
    args.use_full_svd = True
    compare_scores(one.pairwise, args)
    for measured in (False, True):
        args = scores(None)
        args.use_measurement_for_self_influence = measured
        compare_scores(one.self_scores, args)


def test_fp16_with_a_gradient_scaler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kronfluence scales losses on GPUs only: here its scaler is PyTorch's for CPUs."""
    one = pair(tmp_path, amp_dtype=torch.float16, amp_scale=2.0**6)
    scales = []

    def scaler(**arguments) -> torch.amp.GradScaler:
        made = torch.amp.GradScaler("cpu", **arguments)
        scales.append(made.get_scale())
        return made

    for stages in (covariance, eigen):
        monkeypatch.setattr(stages, "GradScaler", scaler)
    one.fit(False, "stock")
    one.fit(True, "fast")
    assert set(scales) == {2.0**6}
    assert {layer.gradient_scale for layer in one.model.layers} == {1.0}
    plain = pair(tmp_path / "plain")
    plain.covariances(False, "stock")
    for load in ("load_covariance_matrices", "load_lambda_matrices"):
        expected, found = (getattr(one.analyzer, load)(name) for name in ("stock", "fast"))
        for name in ("gradient_covariance", "lambda_matrix"):
            if name in expected:
                assert_close(found[name], expected[name], 1e-5)
    unscaled = plain.analyzer.load_covariance_matrices("stock")["gradient_covariance"]
    assert_close(
        one.analyzer.load_covariance_matrices("fast")["gradient_covariance"], unscaled, 1e-2
    )
    args = ScoreArguments(damping_factor=None, amp_dtype=torch.float16)
    for scores in (one.pairwise, one.self_scores):
        expected = scores(False, "stock", args, "fp16")
        assert_close(scores(True, "stock", args, "fp16"), expected, 1e-5)


class MaskByModule(SumLoss):
    """One module has a mask, another one that does not fit (ignored), the last none."""

    def get_attention_mask(self, batch: tuple) -> dict[str, Tensor]:
        return {"layers.0": batch[2], "layers.1": batch[2][:, :-1]}


def test_masks_by_module(tmp_path: Path) -> None:
    torch.manual_seed(8)
    model = Sequence((5, 6, 4, 3), (True, True, False), inplace=False)
    data = examples(9, (3, 5), (3, 3)), examples(4, (3, 5), (3, 3))
    args = FactorArguments(use_empirical_fisher=True)
    one = Pair(model, MaskByModule(masked=True), *data, tmp_path, args)
    expected, found = one.covariances(False, "stock"), one.covariances(True, "fast")
    for name in expected:
        assert_close(found[name], expected[name], 1e-5)
    counts = found["num_activation_covariance_processed"]
    assert int(counts["layers.0"]) == int(one.train.mask.sum())
    assert int(counts["layers.1"]) == int(counts["layers.2"]) == one.train.mask.numel()


def files(folder: Path) -> dict[str, object]:
    """What every file says, but for the numbers: arguments, keys, shapes, dtypes."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            found[name] = json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                # The slices of safetensors know shapes and dtypes without reading.
                slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
                found[name] = (
                    tensors.metadata(),
                    {key: (x.get_shape(), x.get_dtype()) for key, x in slices.items()},
                )
    return found


def test_files_are_those_of_kronfluence(tmp_path: Path) -> None:
    """Every name, key, shape, dtype and recorded argument, partitions included."""
    written = []
    for backend in (False, True):
        one = pair(
            tmp_path / str(backend),
            covariance_data_partitions=2,
            covariance_module_partitions=2,
            lambda_data_partitions=2,
            lambda_dtype=torch.bfloat16,
            gradient_covariance_dtype=torch.float64,
        )
        one.fit(backend, "factors")
        args = functools.partial(ScoreArguments, damping_factor=None, score_dtype=torch.bfloat16)
        with one.side(backend):
            one.analyzer.compute_pairwise_scores(
                "pairwise", "factors", one.query, one.train, 2, 4,
                score_args=args(data_partitions=2, module_partitions=2),
            )  # fmt: skip
            one.analyzer.compute_pairwise_scores(
                "modules", "factors", one.query, one.train, 2, 4,
                score_args=args(compute_per_module_scores=True, query_gradient_low_rank=2),
            )  # fmt: skip
            one.analyzer.compute_self_scores(
                "self", "factors", one.train, 4, score_args=args(data_partitions=2)
            )
        written.append(files(one.folder))
    assert len(written[0]) > 40
    assert written[1] == written[0]


class Faint(SumLoss):
    """Gradients whose eigenvalues are about 1e-12."""

    def compute_train_loss(self, batch, model, sample=False):
        return 1e-6 * super().compute_train_loss(batch, model, sample)


@pytest.mark.parametrize("strategy", ["ekfac", "kfac", "diagonal"])
def test_the_default_damping_follows_small_eigenvalues(strategy: str, tmp_path: Path) -> None:
    pair = Pair(
        Sequence((6, 5, 4), (True, False), inplace=False).double(),
        Faint(),
        examples(9, (3, 6), (3, 4), torch.float64),
        examples(3, (3, 6), (3, 4), torch.float64),
        tmp_path,
        FactorArguments(strategy, **dict.fromkeys(FACTOR_DTYPES, torch.float64)),
    )
    pair.fit(False, "stock")
    dtypes = dict.fromkeys(SCORE_DTYPES, torch.float64)
    args = ScoreArguments(damping_factor=None, compute_per_module_scores=True, **dtypes)
    expected = pair.pairwise(False, "stock", args, "one")
    found = pair.pairwise(True, "stock", args, "one")
    assert_close(found, expected, 1e-10)
