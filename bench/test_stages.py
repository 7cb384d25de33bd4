"""The stages on tiny models, as the command runs them; what the rows hold."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import stages
import torch
from stage_ways import STAGES, Ours, agree, start

from ekfac_fast.model.layers import Layer

BENCH = Path(stages.__file__).parent
CPU = torch.device("cpu")


def test_every_stage_with_conv1d_and_with_shared_inputs(tmp_path):
    out = tmp_path / "new" / "stages.jsonl"
    command = [sys.executable, "-W", "ignore", BENCH / "stages.py", "--smoke", "--device", "cpu"]
    models = ("gpt2", "llama-3-8b")
    command += ["--models", *models, "--repeats", "1", "--threads", "1", "--layers", "1"]
    done = subprocess.run([*command, "--out", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(row["model"], row["stage"]) for row in rows} == {
        (f"{model} (smoke)", stage) for model in models for stage in STAGES
    }
    for row in rows:
        assert row["blocks"] == [1, 2]
        assert set(row["seconds"]) == {"ours", "plain torch", "floor"}
        assert row["over_floor"]["ours"] == row["seconds"]["ours"] / row["seconds"]["floor"]
        assert row["tokens_per_second"]["ours"] == pytest.approx(3 * 24 / row["seconds"]["ours"])
        assert 0 < row["mfu"] < 1
        assert row["failed"] == {}
        assert row["environment"]["device"] == "cpu"
    assert all(f"{model} (smoke) (1 of 2 blocks)" in done.stdout for model in models)


def test_a_wrong_result_is_not_timed():
    layers = [Layer("mlp", 6, 5, True)]
    begun = start("covariance", layers, {"mlp": "mlp"}, (2, 3, 2, 2), torch.float32, CPU)
    ours, plain = Ours("covariance", begun), Ours("covariance", begun)
    ours.found, plain.found = {"A mlp": torch.ones(3, 3)}, {"A mlp": torch.full((3, 3), 1.01)}
    with pytest.raises(AssertionError, match=r"covariance: .* differ by 1\.0e-02"):
        agree(ours, plain, torch.float32)
    assert agree(ours, ours, torch.float32) == 0


def test_the_scan_of_the_issue_is_judged():
    row = {"model": "llama-3-8b", "stage": "scoring", "blocks": (32, 32), "queries": 64, "rank": 32}
    row |= {"dtype": "bfloat16", "over_floor": {"ours": 1.3}}
    assert stages.verdict(row).endswith("required at most 1.35 floors | measured 1.30 | met")
    assert stages.verdict(row | {"over_floor": {"ours": 1.4}}).endswith("NOT MET")
    for other in ({"model": "gpt2"}, {"stage": "queries"}, {"blocks": (2, 32)}, {"queries": 8}):
        assert stages.verdict(row | other) is None


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
