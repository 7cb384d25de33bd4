"""Every stage against kronfluence itself, over shapes, biases, masks, dtypes and arguments."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kronfluence import FactorArguments, ScoreArguments
from test_kronfluence_cases import (
    FLOATS,
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
    spearman,
    texts,
)
from torch import Tensor

TOLERANCE = {"fp32": 1e-5, "fp64": 1e-10}
AB = settings(max_examples=30, deadline=None, derandomize=True, database=None)


@st.composite
def pairs(draw: st.DrawFn, dtypes: tuple[str, ...] = ("fp32", "fp64"), **factor_args: Any):
    """A pair and the name of its dtype; its model has 1 to 3 linears over rows or tokens."""
    dtype = draw(st.sampled_from(dtypes))
    depth = draw(st.integers(1, 3))
    sizes = tuple(draw(st.lists(st.integers(1, 17), min_size=depth + 1, max_size=depth + 1)))
    bias = tuple(draw(st.lists(st.booleans(), min_size=depth, max_size=depth)))
    tokens = draw(st.sampled_from([(), (1,), (4,), (19,), (3, 5)]))
    masked = draw(st.booleans()) and len(tokens) == 1
    torch.manual_seed(draw(st.integers(0, 99)))
    float_type = FLOATS[dtype]
    chosen = {
        "use_empirical_fisher": draw(st.booleans()),
        "offload_activations_to_cpu": draw(st.booleans()),
        "use_iterative_lambda_aggregation": draw(st.booleans()),
        **dict.fromkeys(
            (
                "activation_covariance_dtype",
                "gradient_covariance_dtype",
                "per_sample_gradient_dtype",
                "lambda_dtype",
            ),
            float_type,
        ),
    }
    x, y = (*tokens, sizes[0]), (*tokens, sizes[-1])
    pair = Pair(
        Sequence(sizes, bias, inplace=draw(st.booleans())).to(float_type),
        SumLoss(masked),
        examples(draw(st.integers(4, 11)), x, y, float_type),
        examples(draw(st.integers(1, 6)), x, y, float_type),
        Path(tempfile.mkdtemp()),
        FactorArguments(**(chosen | factor_args)),
        batch=draw(st.integers(1, 5)),
        query_batch=draw(st.integers(1, 3)),
    )
    return pair, dtype


@st.composite
def score_arguments(draw: st.DrawFn, dtype: str, **fixed: Any) -> ScoreArguments:
    """Arguments whose problem is well conditioned: default damping and tiny ones are elsewhere."""
    names = ("query_gradient_svd_dtype", "per_sample_gradient_dtype", "precondition_dtype")
    chosen = {
        "damping_factor": draw(st.sampled_from([None, 0.5])),
        "offload_activations_to_cpu": draw(st.booleans()),
        "compute_per_module_scores": draw(st.booleans()),
        **dict.fromkeys((*names, "score_dtype"), FLOATS[dtype]),
    }
    return ScoreArguments(**(chosen | fixed))


def in_fp64(args: ScoreArguments, **changes: Any) -> ScoreArguments:
    """The same arguments, computed in fp64 from the same gradients of the same model."""
    names = ("query_gradient_svd", "per_sample_gradient", "precondition", "score")
    dtypes = {f"{name}_dtype": torch.float64 for name in names}
    return dataclasses.replace(args, **dtypes, **changes)


def assert_scores(
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
    args: ScoreArguments,
    compute: Callable[[ScoreArguments], dict[str, Tensor]],
) -> None:
    """Within tolerance; where fp32 scores cancel, against fp64 and the size of what cancels.

    A sum of scores, or a single one, may be small beside its terms: then the error has to be
    within tolerance of the scores before their aggregation, or of twice kronfluence's own error.
    """
    if args.score_dtype == torch.float64:
        assert_close(found, expected, TOLERANCE["fp64"])
        return
    with contextlib.suppress(AssertionError):
        assert_close(found, expected, TOLERANCE["fp32"])
        return
    truth = compute(in_fp64(args))
    apart = {"aggregate_query_gradients": False, "aggregate_train_gradients": False}
    terms = compute(in_fp64(args, **apart))
    for name, right in truth.items():
        error = float((found[name] - right).norm())
        theirs = float((expected[name] - right).norm())
        assert error <= max(TOLERANCE["fp32"] * float(terms[name].norm()), 2 * theirs)


@pytest.fixture(autouse=True, scope="module")
def _quick(tmp_path_factory):
    """Releases without waiting; the pairs' folders go where pytest clears up."""
    with quick_release(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("pairs")))
        yield


@AB
@given(pairs())
def test_covariances(case) -> None:
    pair, dtype = case
    expected, found = pair.covariances(False, "stock"), pair.covariances(True, "fast")
    for name in expected:
        assert_close(found[name], expected[name], TOLERANCE[dtype])


@AB
@given(pairs(covariance_data_partitions=2, lambda_data_partitions=2))
def test_factors_in_partitions(case) -> None:
    pair, dtype = case
    pair.fit(False, "stock")
    covariances = pair.covariances(True, "fast")
    for name, expected in pair.analyzer.load_covariance_matrices("stock").items():
        assert_close(covariances[name], expected, TOLERANCE[dtype])
    eigenvalues = pair.eigenvalues(True, "fast_lambda", "stock")
    for name, expected in pair.analyzer.load_lambda_matrices("stock").items():
        assert_close(eigenvalues[name], expected, TOLERANCE[dtype])


@AB
@given(pairs())
def test_eigendecomposition(case) -> None:
    pair, dtype = case
    covariances = pair.covariances(False, "stock")
    expected, found = pair.eigen(False, "stock", "stock"), pair.eigen(True, "fast", "stock")
    assert list(found) == list(expected)
    for side in ("activation", "gradient"):
        values, vectors = f"{side}_eigenvalues", f"{side}_eigenvectors"
        assert_close(found[values], expected[values], TOLERANCE[dtype])
        for module, cov in covariances[f"{side}_covariance"].items():
            Q, lam = found[vectors][module].double(), found[values][module].double()
            assert found[vectors][module].dtype == cov.dtype
            mean = cov.double() / covariances[f"num_{side}_covariance_processed"][module]
            assert distance(Q * lam @ Q.T, mean) <= TOLERANCE[dtype]
            assert distance(Q.T @ Q, torch.eye(len(Q))) <= TOLERANCE[dtype]


@pytest.mark.parametrize("strategy", ["ekfac", "diagonal"])
def test_eigenvalues(strategy: str) -> None:
    @AB
    @given(pairs(strategy=strategy))
    def compare(case) -> None:
        pair, dtype = case
        pair.fit(False, "stock")
        expected = pair.analyzer.load_lambda_matrices("stock")
        source = "fast" if strategy == "diagonal" else "stock"
        found = pair.eigenvalues(True, "fast", source)
        for name in expected:
            assert_close(found[name], expected[name], TOLERANCE[dtype])

    compare()


@pytest.mark.parametrize("strategy", ["identity", "diagonal", "kfac", "ekfac"])
def test_pairwise(strategy: str) -> None:
    @AB
    @given(st.data())
    def compare(data: st.DataObject) -> None:
        pair, dtype = data.draw(pairs(strategy=strategy))
        pair.fit(False, "stock")
        choices = {
            "compute_per_token_scores": data.draw(st.booleans()),
            "aggregate_query_gradients": data.draw(st.booleans()),
            "aggregate_train_gradients": data.draw(st.booleans()),
            "query_gradient_accumulation_steps": data.draw(st.integers(1, 3)),
            "data_partitions": data.draw(st.integers(1, 2)),
        }
        if choices["compute_per_token_scores"]:
            choices["compute_per_module_scores"] = True
        rank = data.draw(st.sampled_from([None, 1, 3]))
        if rank is not None:
            # Rank-deficient queries have singular vectors that are not determined; their factors
            # differ between any two algorithms, L R does not.
            choices |= {"query_gradient_low_rank": rank, "use_full_svd": data.draw(st.booleans())}
        args = data.draw(score_arguments(dtype, **choices))
        hold = data.draw(st.booleans())
        expected = pair.pairwise(False, "stock", args, "ab")
        found = pair.pairwise(True, "stock", args, "ab", hold_queries=hold)
        assert_scores(
            found, expected, args, lambda args: pair.pairwise(False, "stock", args, "fp64")
        )

    compare()


@pytest.mark.parametrize("strategy", ["identity", "diagonal", "kfac", "ekfac"])
@pytest.mark.parametrize("measured", [False, True])
def test_self_scores(strategy: str, measured: bool) -> None:
    @AB
    @given(st.data())
    def compare(data: st.DataObject) -> None:
        pair, dtype = data.draw(pairs(strategy=strategy))
        pair.fit(False, "stock")
        args = data.draw(
            score_arguments(
                dtype,
                use_measurement_for_self_influence=measured,
                data_partitions=data.draw(st.integers(1, 2)),
            )
        )
        expected = pair.self_scores(False, "stock", args, "ab")
        found = pair.self_scores(True, "stock", args, "ab")
        assert_scores(
            found, expected, args, lambda args: pair.self_scores(False, "stock", args, "fp64")
        )

    compare()


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_language_model(dtype: str, tmp_path: Path) -> None:
    """A transformer with padding, module partitions and the full pipeline on each side."""
    float_type = FLOATS[dtype]
    names = ("activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda")
    factor_args = FactorArguments(
        covariance_module_partitions=2,
        lambda_module_partitions=3,
        **{f"{name}_dtype": float_type for name in names},
    )
    torch.manual_seed(3)
    pair = Pair(language_model(float_type), NextToken(), texts(12), texts(5), tmp_path, factor_args)
    pair.fit(False, "stock")
    pair.fit(True, "fast")
    names = ("score", "per_sample_gradient", "precondition", "query_gradient_svd")
    dtypes = {f"{name}_dtype": float_type for name in names}
    for number, choices in enumerate(
        (
            {},
            {"query_gradient_low_rank": 4},
            {"query_gradient_low_rank": 4, "use_full_svd": True, "module_partitions": 2},
            {"compute_per_token_scores": True},
        )
    ):
        args = ScoreArguments(damping_factor=None, **choices, **dtypes)
        expected = pair.pairwise(False, "stock", args, f"{number}")
        found = pair.pairwise(True, "stock", args, f"{number}")
        assert_close(found, expected, TOLERANCE[dtype])
        # Factors fitted with the backend serve kronfluence, and the other way round.
        crossed = pair.pairwise(False, "fast", args, f"{number}_crossed")
        assert spearman(crossed["all_modules"], expected["all_modules"]) > 0.9999
    args = ScoreArguments(damping_factor=None, **dtypes)
    expected = pair.self_scores(False, "stock", args, "self")
    assert_close(pair.self_scores(True, "stock", args, "self"), expected, TOLERANCE[dtype])
