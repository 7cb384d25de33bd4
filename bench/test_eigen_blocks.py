"""The bench of blocks' eigendecompositions, on small matrices."""

import pytest
import torch

import eigen_blocks


def test_a_table_after_a_check(capsys, monkeypatch):
    eigen_blocks.main(["--layers", "1", "--width", "24", "--blocks", "1", "2", "3"])
    said = capsys.readouterr().out
    assert "| blocks | 4 matrices | times faster |" in said
    assert said.count("\n| ") == 4
    monkeypatch.setattr(eigen_blocks, "united", lambda parts, blocks: [
        {"values": torch.ones(25), "vectors": torch.eye(25)}])  # fmt: skip
    with pytest.raises(AssertionError, match="1 blocks"):
        eigen_blocks.main(["--layers", "1", "--width", "24"])
