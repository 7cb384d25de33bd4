"""The backend against dense per-example gradients in fp64, and where kronfluence is not right.

Nothing here is taken from kronfluence's products: gradients come from autograd, one example at a
time, with shared parameters summed as autograd sums them; scores from their definition.
"""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from kronfluence import FactorArguments, ScoreArguments
from test_kronfluence_cases import (
    Examples,
    Halved,
    NextToken,
    Pair,
    Sequence,
    Siblings,
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
from torch import Tensor, nn

LINEARS = ["q", "k", "v", "shared", "head"]
FP64 = {
    f"{name}_dtype": torch.float64
    for name in ("activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda")
}
SCORES_FP64 = {
    f"{name}_dtype": torch.float64
    for name in ("query_gradient_svd", "per_sample_gradient", "precondition", "score")
}


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_release():
        yield


def tell(what: str, ours: float, theirs: float) -> None:
    """Shown by `pytest -s`: the figures of docs/kronfluence.md."""
    print(f"{what}: relative error {ours:.1e}, kronfluence {theirs:.1e}")


def gradients(model: nn.Module, task, data: Examples, measured: bool) -> dict[str, Tensor]:
    """{module: [N,O,J]} by autograd, one example at a time, in fp64."""
    # A prepared model carries wrappers; the parameters inside are those of the plain one.
    model = copy.deepcopy(model).double().requires_grad_(True)
    rows: dict[str, list[Tensor]] = {}
    for index in range(len(data)):
        batch = [x.unsqueeze(0) for x in data[index]]
        batch = [x.double() if x.is_floating_point() else x for x in batch]
        model.zero_grad()
        (task.compute_measurement if measured else task.compute_train_loss)(batch, model).backward()
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                G = module.weight.grad
                if module.bias is not None:
                    G = torch.cat([G, module.bias.grad.unsqueeze(1)], dim=1)
                name = name.removesuffix(".original_module")
                rows.setdefault(name, []).append(G.clone())
    return {name: torch.stack(row) for name, row in rows.items()}


def preconditioned(pair: Pair, G: dict[str, Tensor], damping: float | None) -> dict[str, Tensor]:
    """Qg [(Qg^T G Qa) / (lam / N + damping)] Qa^T with the factors named "stock"."""
    factors = pair.analyzer.load_all_factors("stock")
    result = {}
    for name, lam_sum in factors["lambda_matrix"].items():
        Qa, Qg = (factors[f"{s}_eigenvectors"][name].double() for s in ("activation", "gradient"))
        lam = lam_sum.double() / factors["num_lambda_processed"][name]
        lam = lam + (0.1 * lam.mean() if damping is None else damping)
        result[name] = Qg @ ((Qg.T @ G[name] @ Qa) / lam) @ Qa.T
    return result


def pairwise_truth(pair: Pair, damping: float | None) -> dict[str, Tensor]:
    """{module: [Q,N]}."""
    queries = gradients(pair.model, pair.task, pair.query, measured=True)
    train = gradients(pair.model, pair.task, pair.train, measured=False)
    P = preconditioned(pair, queries, damping)
    return {name: P[name].flatten(1) @ train[name].flatten(1).T for name in P}


def tokens_pair(folder: Path, **choices) -> Pair:
    torch.manual_seed(1)
    args = FactorArguments(use_empirical_fisher=True, **choices)
    model = Sequence((9, 14, 6, 3), (True, False, True), inplace=False)
    data = (examples(n, (7, 9), (7, 3)) for n in (13, 5))
    return Pair(model, SumLoss(masked=True), *data, folder, args)


def siblings_pair(folder: Path, dtype=torch.float64, **choices) -> Pair:
    torch.manual_seed(2)
    args = FactorArguments(
        use_empirical_fisher=True, has_shared_parameters=True, **(FP64 | choices)
    )
    data = (
        Examples(torch.randn(n, 2, 4, 3).to(dtype), torch.randn(n, 3, 5).to(dtype)) for n in (13, 5)
    )
    return Pair(Siblings().to(dtype), SumLoss(modules=LINEARS), *data, folder, args)


def test_covariances_and_eigenvalues(tmp_path: Path) -> None:
    pair = tokens_pair(tmp_path)
    pair.fit(True, "stock")
    inputs: dict[str, list[Tensor]] = {}
    model = copy.deepcopy(pair.model).double().requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            key = name.removesuffix(".original_module")
            module.register_forward_hook(lambda m, x, y, k=key: inputs.setdefault(k, []).append(x))
    model(pair.train.x.double())
    kept = pair.train.mask.bool()
    found = pair.analyzer.load_covariance_matrices("stock")
    G = gradients(pair.model, pair.task, pair.train, measured=False)
    factors = pair.analyzer.load_all_factors("stock")
    for name, cov in found["activation_covariance"].items():
        rows = inputs[name][0][0][kept]
        if len(cov) > rows.shape[1]:
            rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
        assert distance(cov, rows.T @ rows) < 1e-5
        Qa, Qg = (factors[f"{s}_eigenvectors"][name].double() for s in ("activation", "gradient"))
        lam = (Qg.T @ G[name] @ Qa).square().sum(0)
        assert distance(factors["lambda_matrix"][name], lam) < 1e-5
    counts = {int(n) for n in found["num_activation_covariance_processed"].values()}
    assert counts == {int(kept.sum())}


@pytest.mark.parametrize("damping", [None, 1e-8])
def test_pairwise_and_self(damping: float | None, tmp_path: Path) -> None:
    pair = tokens_pair(tmp_path)
    pair.fit(False, "stock")
    args = ScoreArguments(damping_factor=damping, compute_per_module_scores=True)
    truth = pairwise_truth(pair, damping)
    found = pair.pairwise(True, "stock", args, "truth")
    stock = pair.pairwise(False, "stock", args, "truth")
    assert found.keys() == truth.keys()
    for name in truth:
        # Tiny damping amplifies the rounding of the fp32 gradients, on both sides alike.
        allowed = max(1e-5, 2 * distance(stock[name], truth[name]))
        assert distance(found[name], truth[name]) < allowed
        assert spearman(found[name], truth[name]) > 0.9999
    train = gradients(pair.model, pair.task, pair.train, measured=False)
    P = preconditioned(pair, train, damping)
    found = pair.self_scores(True, "stock", args, "truth")
    stock = pair.self_scores(False, "stock", args, "truth")
    for name in P:
        right = (P[name] * train[name]).sum((1, 2))
        assert distance(found[name], right) < max(1e-5, 2 * distance(stock[name], right))


def test_language_model_in_fp64(tmp_path: Path) -> None:
    torch.manual_seed(3)
    args = FactorArguments(use_empirical_fisher=True, **FP64)
    pair = Pair(language_model(torch.float64), NextToken(), texts(9), texts(4), tmp_path, args)
    pair.fit(True, "stock")
    truth = pairwise_truth(pair, None)
    args = ScoreArguments(damping_factor=None, compute_per_module_scores=True, **SCORES_FP64)
    assert_close(pair.pairwise(True, "stock", args, "truth"), truth, 1e-10)
    total = sum(truth.values())
    args = dataclasses.replace(args, compute_per_module_scores=False)
    assert_close(pair.pairwise(True, "stock", args, "truth"), {"all_modules": total}, 1e-10)


def test_exact_truncation_is_the_best_one(tmp_path: Path) -> None:
    """`use_full_svd`: the SVD of the preconditioned query, for either orientation."""
    pair = tokens_pair(tmp_path, **FP64)
    pair.model.double()
    for data in (pair.train, pair.query):
        data.x, data.y = data.x.double(), data.y.double()
    pair.fit(False, "stock")
    queries = gradients(pair.model, pair.task, pair.query, measured=True)
    train = gradients(pair.model, pair.task, pair.train, measured=False)
    truth = {}
    for name, P in preconditioned(pair, queries, None).items():
        U, S, Vh = torch.linalg.svd(P, full_matrices=False)
        P = (U[..., :2] * S[:, None, :2]) @ Vh[:, :2]
        truth[name] = P.flatten(1) @ train[name].flatten(1).T
    args = ScoreArguments(
        damping_factor=None,
        compute_per_module_scores=True,
        query_gradient_low_rank=2,
        use_full_svd=True,
        **SCORES_FP64,
    )
    assert_close(pair.pairwise(True, "stock", args, "truth"), truth, 1e-10)
    found = pair.pairwise(True, "stock", args, "truth", truncation="randomised")
    assert_close(found, truth, 1e-6)


@pytest.mark.parametrize("per_module", [False, True])
@pytest.mark.parametrize("low_rank", [None, 4])
def test_shared_parameters(per_module: bool, low_rank: int | None, tmp_path: Path) -> None:
    """kronfluence scores the last use of a shared module only; ours are the sum of the uses."""
    pair = siblings_pair(tmp_path)
    pair.fit(True, "stock")
    args = ScoreArguments(
        damping_factor=None,
        compute_per_module_scores=per_module,
        query_gradient_low_rank=low_rank,
        use_full_svd=True,
        **SCORES_FP64,
    )
    found = pair.pairwise(True, "stock", args, "shared")
    wrong = pair.pairwise(False, "stock", args, "shared")
    if low_rank is not None:
        assert found.keys() == wrong.keys()
        return
    truth = pairwise_truth(pair, None)
    truth = truth if per_module else {"all_modules": sum(truth.values())}
    assert_close(found, truth, 1e-10)
    name = "shared" if per_module else "all_modules"
    error = distance(wrong[name], truth[name])
    tell(f"shared parameters, pairwise, {name}", distance(found[name], truth[name]), error)
    assert error > 0.01


def test_shared_parameters_aggregated_and_measured(tmp_path: Path) -> None:
    pair = siblings_pair(tmp_path)
    pair.fit(True, "stock")
    total = sum(pairwise_truth(pair, None).values())
    for query, train in ((True, False), (False, True), (True, True)):
        args = ScoreArguments(
            damping_factor=None,
            aggregate_query_gradients=query,
            aggregate_train_gradients=train,
            **SCORES_FP64,
        )
        truth = total.sum(0, keepdim=True) if query else total
        truth = truth.sum(1, keepdim=True) if train else truth
        found = pair.pairwise(True, "stock", args, "shared")
        assert_close(found, {"all_modules": truth}, 1e-10)
        wrong = pair.pairwise(False, "stock", args, "shared")
        label = f"shared parameters, aggregated queries={query}, train={train}"
        errors = (distance(scores["all_modules"], truth) for scores in (found, wrong))
        tell(label, *errors)
    args = ScoreArguments(
        damping_factor=None, use_measurement_for_self_influence=True, **SCORES_FP64
    )
    measured = gradients(pair.model, pair.task, pair.train, measured=True)
    losses = gradients(pair.model, pair.task, pair.train, measured=False)
    P = preconditioned(pair, measured, None)
    truth = sum((P[name] * losses[name]).sum((1, 2)) for name in P)
    found = pair.self_scores(True, "stock", args, "shared")
    assert_close(found, {"all_modules": truth}, 1e-10)
    wrong = pair.self_scores(False, "stock", args, "shared")["all_modules"]
    errors = distance(found["all_modules"], truth), distance(wrong, truth)
    tell("shared parameters, self-influence with measurement", *errors)
    assert errors[1] > 0.01


def test_post_processed_per_module_scores_are_of_one_batch(tmp_path: Path) -> None:
    """kronfluence adds the scores of all training batches so far; their sum over modules tells."""
    torch.manual_seed(4)
    pair = Pair(
        Siblings(),
        Halved(modules=["conv", "q", "head"]),
        Examples(torch.randn(12, 2, 4, 3), torch.randn(12, 3, 5)),
        Examples(torch.randn(4, 2, 4, 3), torch.randn(4, 3, 5)),
        tmp_path,
    )
    pair.fit(False, "stock")
    args = ScoreArguments(damping_factor=None)
    truth = pair.pairwise(False, "stock", args, "sum")["all_modules"]
    args = ScoreArguments(damping_factor=None, compute_per_module_scores=True)
    found = sum(pair.pairwise(True, "stock", args, "module").values())
    wrong = sum(pair.pairwise(False, "stock", args, "module").values())
    errors = distance(found, truth), distance(wrong, truth)
    tell("post-processed, per-module scores", *errors)
    assert errors[0] < 1e-5
    assert errors[1] > 0.1


def test_bf16_factors_are_nearer_to_fp64(tmp_path: Path) -> None:
    """kronfluence accumulates in bf16: over many batches small addends are lost."""
    names = ("activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda")
    low = {f"{name}_dtype": torch.bfloat16 for name in names}
    torch.manual_seed(6)
    model = Sequence((24, 16, 8), (True, True), inplace=False)
    data = examples(192, (3, 24), (3, 8)), examples(4, (3, 24), (3, 8))
    pair = Pair(
        model, SumLoss(), *data, tmp_path, FactorArguments(use_empirical_fisher=True), batch=1
    )
    pair.factor_args = dataclasses.replace(pair.factor_args, **FP64)
    truth = pair.covariances(False, "truth")
    eigen = pair.eigen(False, "truth", "truth")
    lam = pair.eigenvalues(False, "truth", "truth")["lambda_matrix"]
    pair.factor_args = dataclasses.replace(pair.factor_args, **low)
    stock, found = pair.covariances(False, "low"), pair.covariances(True, "fast")
    for name in ("activation_covariance", "gradient_covariance"):
        for module, right in truth[name].items():
            assert found[name][module].dtype == torch.bfloat16
            ours, theirs = (distance(x[name][module], right) for x in (found, stock))
            tell(f"bf16 {name} of {module}, 192 batches", ours, theirs)
            assert ours < min(0.01, theirs)
    assert eigen
    stock = pair.eigenvalues(False, "low_lambda", "truth")["lambda_matrix"]
    found = pair.eigenvalues(True, "fast_lambda", "truth")["lambda_matrix"]
    for module, right in lam.items():
        assert found[module].dtype == torch.bfloat16
        ours, theirs = distance(found[module], right), distance(stock[module], right)
        tell(f"bf16 eigenvalues of {module}, 192 batches", ours, theirs)
        assert ours < min(0.02, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("choices", [{}, {"query_gradient_low_rank": 4, "use_full_svd": True}])
def test_short_floats_are_no_farther_from_fp64(
    choices: dict, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    model = Sequence((24, 32, 16, 8), (True, True, False), inplace=False)
    data = examples(64, (9, 24), (9, 8)), examples(8, (9, 24), (9, 8))
    pair = Pair(model, SumLoss(), *data, tmp_path, batch=16)
    pair.fit(False, "stock")
    truth_args = ScoreArguments(damping_factor=None, **SCORES_FP64)
    low = dict.fromkeys(SCORES_FP64, dtype) | {"query_gradient_svd_dtype": torch.float32}
    args = ScoreArguments(damping_factor=None, **low)
    for scores in (pair.pairwise, pair.self_scores):
        extra = choices if scores == pair.pairwise else {}
        truth = scores(False, "stock", dataclasses.replace(truth_args, **extra), "fp64")
        stock = scores(False, "stock", dataclasses.replace(args, **extra), "bf16")
        found = scores(True, "stock", dataclasses.replace(args, **extra), "bf16")
        right = truth["all_modules"]
        assert found["all_modules"].dtype == dtype
        ours, theirs = (distance(x["all_modules"], right) for x in (found, stock))
        rank = extra.get("query_gradient_low_rank", "full")
        tell(f"{dtype} scores, {scores.__name__}, rank {rank}", ours, theirs)
        assert ours <= theirs
