"""On, off, by thread, by command; what is reported, held together and refused."""

import json
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kronfluence import ScoreArguments
from kronfluence.computer import factor_computer
from kronfluence.module import TrackedModule
from kronfluence.module.linear import TrackedLinear
from test_kronfluence_cases import (
    Examples,
    Halved,
    NextToken,
    Pair,
    Siblings,
    SumLoss,
    assert_close,
    language_model,
    pytestmark,  # noqa: F401
    small_pair,
    switched_off,  # noqa: F401
    texts,
)
from torch import Tensor, nn

import ekfac_fast.kronfluence as fast
from ekfac_fast.curvature import eigen
from ekfac_fast.curvature.threads import eigh, spread
from ekfac_fast.kronfluence import options as switched
from ekfac_fast.kronfluence import patches, switch
from ekfac_fast.kronfluence.modules import FastLinear
from ekfac_fast.ops import products


def snapshot() -> list:
    names = [(path, name) for path, name in patches.FUNCTIONS]
    found = [getattr(sys.modules[f"kronfluence.{path}"], name) for path, name in names]
    return [*found, *TrackedModule.SUPPORTED_MODULES.items()]


def test_disabling_restores_every_name() -> None:
    before = snapshot()
    fast.enable()
    during = snapshot()
    assert all(x is not y for x, y in zip(before, during, strict=True))
    fast.enable(truncation="randomised")
    assert snapshot() == during
    assert switched.current() == switch.Options(truncation="randomised")
    fast.disable()
    assert snapshot() == before
    fast.disable()
    assert snapshot() == before


def test_blocks_nest_and_do_not_end_each_other() -> None:
    before = snapshot()
    with fast.enabled(hold_queries=False):
        with fast.enabled():
            assert switched.current() == switch.Options()
        assert switched.current() == switch.Options(hold_queries=False)
        fast.enable(memory_share=0.5)
        fast.disable()
        assert switched.current() == switch.Options(hold_queries=False)
    assert snapshot() == before
    with pytest.raises(KeyError), fast.enabled():
        raise KeyError
    assert snapshot() == before


def test_threads_share_one_switch() -> None:
    before = snapshot()
    inside, leave = threading.Barrier(9), threading.Event()

    def hold() -> None:
        for _ in range(50):
            with fast.enabled():
                pass
        with fast.enabled():
            inside.wait()
            leave.wait()

    threads = [threading.Thread(target=hold) for _ in range(8)]
    for thread in threads:
        thread.start()
    inside.wait()
    assert TrackedModule.SUPPORTED_MODULES[nn.Linear] is FastLinear
    leave.set()
    for thread in threads:
        thread.join()
    assert snapshot() == before


class Toggling(SumLoss):
    """Lets another thread turn the backend off, or on, at the first loss of a stage."""

    toggle: Callable[[], None] | None = None

    def compute_train_loss(self, batch: tuple, model: nn.Module, sample: bool = False) -> Tensor:
        if self.toggle is not None:
            thread = threading.Thread(target=self.toggle)
            self.toggle = None
            thread.start()
            thread.join()
        return super().compute_train_loss(batch, model, sample)


@pytest.mark.parametrize("begins", ["on", "off"])
def test_a_stage_ends_on_the_path_on_which_it_began(begins: str, tmp_path: Path) -> None:
    one = small_pair(tmp_path, Toggling(), use_empirical_fisher=True)
    one.fit(False, "stock")
    layer = one.model.layers[0]
    low_rank = ScoreArguments(damping_factor=None, query_gradient_low_rank=2)
    measured = ScoreArguments(damping_factor=None, use_measurement_for_self_influence=True)
    stages = {
        "covariance": lambda: one.covariances(False, begins)["gradient_covariance"],
        "lambda": lambda: one.eigenvalues(False, f"{begins}_lambda", "stock")["lambda_matrix"],
        "pairwise_score": lambda: one.pairwise(False, "stock", low_rank, begins),
        "self_measurement_score": lambda: one.self_scores(False, "stock", measured, begins),
    }
    for stage, run_it in stages.items():
        expected = run_it()
        if begins == "on":
            fast.enable()
        one.task.toggle = fast.disable if begins == "on" else fast.enable
        shutil.rmtree(tmp_path / "ab" / f"factors_{begins}", ignore_errors=True)
        shutil.rmtree(tmp_path / "ab" / f"factors_{begins}_lambda", ignore_errors=True)
        found = run_it()
        assert one.task.toggle is None
        assert (switched.current() is None) == (begins == "on")
        fast.disable()
        tracker = type(layer._trackers[stage]).__name__
        assert tracker.startswith("Fast") == (begins == "on"), stage
        assert_close(found, expected, 1e-5)


def test_what_others_replaced_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(TrackedLinear):
        pass

    monkeypatch.setitem(TrackedModule.SUPPORTED_MODULES, nn.Linear, Mine)
    own = factor_computer.perform_eigendecomposition
    monkeypatch.setattr(factor_computer, "perform_eigendecomposition", own)
    fast.enable()
    assert TrackedModule.SUPPORTED_MODULES[nn.Linear] is Mine
    factor_computer.perform_eigendecomposition = "on top of ours"
    fast.disable()
    assert factor_computer.perform_eigendecomposition == "on top of ours"


@pytest.mark.parametrize("version", ["0.0.2", "1.0.0", "2.0.0"])
def test_other_versions_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot()
    monkeypatch.setattr(switch, "version", lambda _: version)
    with pytest.raises(ImportError, match=rf"{version}.*>= 1\.0\.1, < 2"):
        fast.enable()
    assert snapshot() == before
    assert switched.current() is None


def test_absence_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise switch.PackageNotFoundError(name)

    monkeypatch.setattr(switch, "version", missing)
    with pytest.raises(ModuleNotFoundError, match="--no-deps"):
        fast.enable()


@pytest.mark.parametrize("options", [{"truncation": "best"}, {"memory_share": 2}])
def test_options_are_checked(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        fast.enable(**options)
    assert switched.current() is None


def test_models_join_and_leave_whenever_they_were_prepared(tmp_path: Path) -> None:
    before = small_pair(tmp_path / "before")
    with fast.enabled():
        during = small_pair(tmp_path / "during")
    assert type(before.model.layers[0]) is TrackedLinear
    assert type(during.model.layers[0]) is FastLinear
    for one in (before, during):
        one.fit(True, "fast")
        assert one.model.layers[0]._trackers["lambda"].__class__.__name__ == "FastLambdaTracker"
        one.fit(False, "stock")
        assert one.model.layers[0]._trackers["lambda"].__class__.__name__ == "LambdaTracker"
        found = one.analyzer.load_lambda_matrices("fast")["lambda_matrix"]
        assert_close(found, one.analyzer.load_lambda_matrices("stock")["lambda_matrix"], 1e-5)
    assert before.model.state_dict().keys() == during.model.state_dict().keys()


def test_report_names_path_and_reason(tmp_path: Path) -> None:
    data = [Examples(torch.randn(n, 2, 4, 3), torch.randn(n, 3, 5)) for n in (6, 4)]
    mixed = Pair(Siblings(), Halved(modules=["conv", "head"]), *data, tmp_path)
    mixed.fit(True, "fast")
    rows = {(row.module, row.stage): row for row in fast.report().rows}
    assert rows["head", "covariance"].path == "ekfac_fast"
    assert rows["head", "lambda"].path == "kronfluence"
    assert "post-processes" in rows["head", "lambda"].why
    assert rows["conv", "covariance"].path == "kronfluence"
    assert rows["conv", "covariance"].why == "Conv2d is not covered"
    assert "head" in str(fast.report())


def test_equal_covariances_share_one_eigendecomposition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    one = Pair(language_model(), NextToken(), texts(6), texts(2), tmp_path)
    one.covariances(False, "stock")
    sizes: list[int] = []
    inner = torch.linalg.eigh

    def counting(matrices: Tensor) -> tuple[Tensor, Tensor]:
        sizes.extend([matrices.shape[-1]] * (len(matrices) if matrices.ndim == 3 else 1))
        return inner(matrices)

    monkeypatch.setattr(torch.linalg, "eigh", counting)
    expected = one.eigen(False, "stock", "stock")
    assert len(sizes) == 28
    for solve in (eigen._one_by_one, eigen._in_batches):
        monkeypatch.setattr(eigen, "_one_by_one", solve)
        sizes.clear()
        found = one.eigen(True, solve.__name__, "stock")
        # q, k and v share an input, gate and up another: 3 of 7 in each of 2 layers.
        assert len(sizes) == 22
        # Threads begin in order, but may overtake each other on the way.
        assert sorted(sizes, reverse=True)[0] == max(sizes[:2])
        for name in ("activation_eigenvalues", "gradient_eigenvalues"):
            assert_close(found[name], expected[name], 1e-6)


def test_work_is_spread_in_order_and_threads_come_back() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        seen = list(spread(lambda item: (item, torch.get_num_threads()), range(7)))
        assert seen == [(item, 1) for item in range(7)]
        assert torch.get_num_threads() == 3
        with pytest.raises(ZeroDivisionError):
            list(spread(lambda item: 1 / item, [1, 0, 1]))
        assert torch.get_num_threads() == 3
        matrices = torch.randn(5, 6, 6, dtype=torch.float64)
        matrices = matrices + matrices.mT
        for found, expected in zip(eigh(matrices), torch.linalg.eigh(matrices), strict=True):
            assert torch.equal(found, expected)
    finally:
        torch.set_num_threads(threads)


def test_batch_size_search_and_masks_of_any_kind(tmp_path: Path) -> None:
    one = small_pair(tmp_path, SumLoss(masked=True))
    one.batch = None
    for kind in (torch.bool, torch.int32):
        one.train.mask = one.train.mask.to(kind)
        expected = one.covariances(False, f"stock_{kind}")
        found = one.covariances(True, f"fast_{kind}")
        for name in expected:
            assert_close(found[name], expected[name], 1e-5)
    # Not a mask but weights: kronfluence multiplies by them, so does the backend.
    one.train.mask = one.train.mask * 3
    expected, found = one.covariances(False, "stock_3"), one.covariances(True, "fast_3")
    for name in expected:
        assert_close(found[name], expected[name], 1e-5)


def test_autocast_does_not_round_covariances(tmp_path: Path) -> None:
    one = small_pair(tmp_path, amp_dtype=torch.bfloat16)
    expected, found = one.covariances(False, "stock"), one.covariances(True, "fast")
    for name in expected:
        assert_close(found[name], expected[name], 1e-5)
    one.eigen(False, "stock", "stock")
    one.eigenvalues(False, "stock", "stock")
    args = ScoreArguments(damping_factor=None, amp_dtype=torch.bfloat16)
    expected = one.pairwise(False, "stock", args, "amp")
    assert_close(one.pairwise(True, "stock", args, "amp"), expected, 1e-5)
    expected = one.self_scores(False, "stock", args, "amp")
    assert_close(one.self_scores(True, "stock", args, "amp"), expected, 1e-5)


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=240
    )


def test_importing_us_does_not_import_kronfluence(tmp_path: Path) -> None:
    code = "import sys, ekfac_fast.kronfluence; sys.exit('kronfluence' in sys.modules)"
    assert run("-c", code, cwd=tmp_path).returncode == 0


SCRIPT = """
    import json, sys
    import torch
    from kronfluence import Analyzer, FactorArguments, ScoreArguments, prepare_model
    sys.path.insert(0, sys.argv[1])
    from test_kronfluence_cases import Sequence, SumLoss, examples
    from beside import NAME

    if __name__ == "__main__":
        torch.manual_seed(0)
        model = prepare_model(Sequence((5, 6, 4), (True, False), inplace=False), SumLoss())
        train, query = examples(9, (3, 5), (3, 4)), examples(7, (3, 5), (3, 4))
        analyzer = Analyzer(NAME, model, SumLoss(), cpu=True, disable_tqdm=True)
        analyzer.fit_all_factors("f", train, per_device_batch_size=4)
        args = ScoreArguments(damping_factor=None)
        analyzer.compute_pairwise_scores("s", "f", query, train, 2, 4, score_args=args)
        scores = analyzer.load_pairwise_scores("s")["all_modules"]
        print(json.dumps([sys.argv[2:], type(model.layers[0]).__name__, scores.tolist()]))
"""


def test_an_unchanged_script_runs_with_the_backend(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "script.py").write_text(textwrap.dedent(SCRIPT))
    (folder / "beside.py").write_text("NAME = 'unchanged'\n")
    script, tests = str(folder / "script.py"), str(Path(__file__).parent)
    plain = run(script, tests, "--report", "x", cwd=tmp_path / "project")
    backed = run(
        "-m", "ekfac_fast.kronfluence", "--report", script, tests, "--report", "x", cwd=tmp_path
    )
    assert plain.returncode == 0, plain.stderr
    assert backed.returncode == 0, backed.stderr
    arguments, kind, expected = json.loads(plain.stdout.splitlines()[-1])
    found_arguments, found_kind, found = json.loads(backed.stdout.splitlines()[-1])
    assert arguments == found_arguments == ["--report", "x"]
    assert (kind, found_kind) == ("TrackedLinear", "FastLinear")
    assert "2 Linear" in backed.stderr
    assert_close({"s": torch.tensor(found)}, {"s": torch.tensor(expected)}, 1e-5)


def test_the_command_names_a_missing_script(tmp_path: Path) -> None:
    result = run("-m", "ekfac_fast.kronfluence", "absent.py", cwd=tmp_path)
    assert result.returncode == 1
    assert "no script 'absent.py'" in result.stderr


@pytest.mark.skipif(not products.available(), reason="no AVX-512 or no oneDNN")
def test_linear_layers_run_on_the_fastest_product(tmp_path: Path, monkeypatch) -> None:
    calls, own = [], products.onednn
    monkeypatch.setattr(products, "WORTHWHILE", 1)
    monkeypatch.setattr(products, "onednn", lambda *args: (calls.append(1), own(*args))[1])
    pair = small_pair(tmp_path)
    plain = pair.covariances(False, "plain")
    assert not calls
    ours = pair.covariances(True, "ours")
    assert calls
    for name, expected in plain.items():
        assert_close(ours[name], expected, 1e-5)
