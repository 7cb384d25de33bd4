"""The benches of several processes and of memory, on a small model."""

import memory
import processes


def test_ways_are_compared(capfd, monkeypatch):
    monkeypatch.setattr(processes, "APART", 1e-2)
    sizes = ["--blocks", "1", "--width", "64", "--fitted", "10", "--scanned", "10"]
    processes.main(["--ways", "1x1", "2x1", "--turns", "1", *sizes])
    said = capfd.readouterr().out
    assert said.count(" s, ") == 4
    assert "| 2 x 1 |" in said


def test_stages_beside_their_plan(tmp_path):
    job = memory.Job(blocks=1, width=64, fitted=4)
    for stage in memory.STAGES:
        found = job.run(stage, tmp_path, None)
        assert 0 <= found["own"] < found["with files"]
    costs = job.plan("100MiB")
    assert costs.partitions == 1
    assert {x.name for x in costs.stages} >= {x for names in memory.STAGES.values() for x in names}
