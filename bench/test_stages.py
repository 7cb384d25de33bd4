"""The stages on tiny models, as the command runs them; what the rows hold."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import stages
from measure.rows import Row, read
from ways.stage_ways import STAGES, agree


# What transformers warns about is not ours to fail on.
@pytest.mark.filterwarnings("ignore")
def test_every_stage_with_conv1d_and_with_shared_inputs(tmp_path, capsys):
    out = tmp_path / "new" / "stages.jsonl"
    models = ("gpt2", "llama-3-8b")
    words = ["--smoke", "--device", "cpu", "--models", *models, "--repeats", "1", "--threads", "1"]
    stages.main([*words, "--layers", "1", "--out", str(out)])
    shown = capsys.readouterr().out
    rows = read(out)
    assert {(row.name, row.quantity) for row in rows} == {
        (f"{model} (smoke)", stage) for model in models for stage in STAGES
    }
    for row in rows:
        assert row.shape == {
            "blocks": 1,
            "all_blocks": 2,
            "sequences": 3,
            "tokens": 24,
            "queries": 3,
            "rank": 32,
        }
        assert set(row.seconds) == {"ours", "plain torch", "floor"}
        assert row.over("floor") == row.seconds["ours"] / row.seconds["floor"]
        assert f"| {3 * 24 / row.seconds['ours']:.0f} tokens/s |" in shown
        assert 0 < row.gemm_share < 1
        assert row.failed == {}
        assert row.environment["device"] == "cpu"
    assert all(f"{model} (smoke) (1 of 2 blocks)" in shown for model in models)


def test_a_wrong_result_is_not_timed():
    ours, plain = (
        SimpleNamespace(stage="covariance", found={"A mlp": torch.full((3, 3), value)})
        for value in (1.0, 1.01)
    )
    with pytest.raises(AssertionError, match=r"covariance: .* differ by 1\.0e-02"):
        agree(ours, plain, torch.float32)
    assert agree(ours, ours, torch.float32) == 0


def test_the_scan_of_the_issue_is_judged():
    sizes = {"blocks": 32, "all_blocks": 32, "queries": 64, "rank": 32}
    seconds = {"ours": 1.3, "floor": 1.0}
    row = Row("stages", "llama-3-8b", "scoring", sizes, "bfloat16", seconds=seconds)
    assert stages.verdict(row).endswith("required at most 1.35 floors | measured 1.30 | met")
    slow = replace(row, seconds={"ours": 1.4, "floor": 1.0})
    assert stages.verdict(slow).endswith("NOT MET")
    for other in (
        {"name": "gpt2"},
        {"quantity": "queries"},
        {"shape": sizes | {"blocks": 2}},
        {"shape": sizes | {"queries": 8}},
        {"dtype": "float32"},
    ):
        assert stages.verdict(replace(row, **other)) is None


def test_sizes_follow_the_device_and_smoke():
    chosen = stages.parse(["--device", "cpu"])
    assert (chosen.tokens, chosen.sequences, chosen.queries) == (128, 4, 8)
    assert chosen.compile is False
    assert stages.parse(["--device", "cpu", "--smoke", "--tokens", "7"]).tokens == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "gpt7"], "invalid choice: 'gpt7'"),
        (["--stages", "nothing"], "invalid choice: 'nothing'"),
        (["--layers", "0"], "--layers 0: at least one block"),
    ],
)
def test_wrong_arguments_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        stages.parse([*words, "--device", "cpu"])
    assert message in capsys.readouterr().err
