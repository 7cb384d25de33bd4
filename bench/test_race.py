"""A race of a small job from end to end, by real processes."""

import json
from pathlib import Path

import pytest
import torch
import transformers

import race
from measure.rows import OURS, read
from pages import tables
from ways.racers import job


@pytest.mark.parametrize("rival", ["kronfluence", "kronfluence on our backend"])
def test_two_contestants_agree(tmp_path: Path, monkeypatch, rival) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2,
        vocab_size=300, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 300, (40, 32), generator=generator).tolist()

    def write(path, model, *, fit, scan, queries, blocks):
        asked = [{"input_ids": x, "labels": [-100] * 24 + x[24:]} for x in ids[scan:][:queries]]
        task = {"fit": ids[:fit], "scan": ids[:scan], "queries": asked, "blocks": blocks}
        path.write_text(json.dumps(task))

    monkeypatch.setattr(job, "write", write)
    words = f"--model {tmp_path / 'small'} --fit 24 --scan 12 --queries 2 --blocks 1 --runs 1"
    out = tmp_path / "race.jsonl"
    race.main([*words.split(), "--only", OURS, rival, "--out", str(out), "--work", str(tmp_path)])
    (row,) = read(out)
    assert row.shape == {"fit": 24, "scan": 12, "queries": 2, "blocks": 1}
    assert row.details["spearman"][OURS] == pytest.approx(1)
    assert row.details["spearman"][rival] > 0.7  # labels of other generators
    assert set(row.details["stages"][OURS]) == {"start", "fit", "queries", "scan"}
    assert rival in tables.race([row])
