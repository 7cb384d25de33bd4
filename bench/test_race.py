"""A race of a small job from end to end, by real processes."""

import json
import sys
import zipfile
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

import race
from measure.rows import OURS, Row, read
from pages import tables
from race import Contestant
from ways.racers import environments, job

# A contestant that computes nothing: what it says and leaves behind is what a race reads.
ARRIVES = """
import json, sys
import numpy as np
sys.path.insert(0, ".")
from ways.racers.meter import stage
job = json.load(open(sys.argv[2]))
for _ in range(2):
    with stage("scan"):
        scores = np.arange(len(job["queries"]) * len(job["scan"])) ** 2
np.save(f"{sys.argv[3]}/scores.npy", scores.reshape(len(job["queries"]), -1))
"""
GREEDY = "bytearray(3 << 30)"
CRASHES = "import sys; print('first', file=sys.stderr); sys.exit('a | b\\n')"


@pytest.fixture
def small(tmp_path: Path, monkeypatch) -> Path:
    """A model of two blocks, and its corpus."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2,
        vocab_size=300, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    words.save_pretrained(tmp_path / "small")
    ids = torch.randint(0, 300, (60, 32), generator=torch.Generator().manual_seed(0)).tolist()
    ids[:12] = [x[: 32 - i % 5] for i, x in enumerate(ids[:12])]
    ids[7], ids[37] = ids[2], ids[36]  # texts that are equal, among the scanned and the queries
    monkeypatch.setattr(job, "corpus", lambda model: ids)
    return tmp_path / "small"


def raced(small: Path, words: str, *only: str) -> list[Row]:
    """The rows of a race."""
    out = small.parent / "race.jsonl"
    given = f"--model {small} --fit 24 --scan 36 --blocks 1 --runs 1 {words}".split()
    race.main([*given, "--only", *only, "--out", str(out), "--work", str(small.parent)])
    return read(out)


def is_here(name: str) -> bool:
    """Whether a contestant needs nothing that a test does not install."""
    peer = race.CONTESTANTS[name].peer
    return not peer or (race.ENVIRONMENTS / peer / "made").exists()


def python_of(name: str) -> str:
    """The interpreter of a contestant, which a test does not install."""
    if not is_here(name):
        pytest.skip(f"{name} is not here; python bench/race.py --only {name} installs it")
    (python,) = race.installed([name], race.ENVIRONMENTS)[0].values()
    return python


def test_contestants_agree(small: Path) -> None:
    rivals = [x for x in race.CONTESTANTS if x not in (OURS, "ours, bf16") and is_here(x)]
    assert len(rivals) >= 2
    (row,) = raced(small, "--queries 3", OURS, *rivals)
    assert not row.failed
    assert row.shape == {"fit": 24, "scan": 36, "queries": 3, "blocks": 1}
    assert row.details["spearman"][OURS] == pytest.approx(1)
    assert set(row.details["stages"][OURS]) == {"start", "fit", "queries", "scan"}
    for rival in rivals:
        assert row.details["spearman"][rival] > 0.7  # labels of other generators
        assert row.extra_bytes[rival] > 2**27
        assert rival in tables.race([row])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bergson", "dattri-LLM"])
def test_queries_in_several_passes_score_as_in_one(small: Path, name) -> None:
    python, found = python_of(name), []
    for at_once in (3, 2):
        task, out = small.parent / "job.json", small.parent / "out"
        memory = at_once * 4 * 4 * sum(job.mlps(small, 1).values())
        job.write(task, small, fit=8, scan=12, queries=3, blocks=1, memory=memory)
        assert job.dense_at_once(json.loads(task.read_text())) == at_once
        found.append(race.run(name, python, small, task, out, 2**34).scores)
    assert found[0].shape == (3, 12)
    torch.testing.assert_close(*map(torch.tensor, found), rtol=1e-3, atol=1e-4)


def test_who_fails_is_told_and_the_others_race_on(small: Path, monkeypatch, capsys) -> None:
    scripts = {OURS: ARRIVES, "greedy": GREEDY, "crashes": CRASHES}
    for name, text in scripts.items():
        (small.parent / f"{name}.py").write_text(text)
    entered = {name: Contestant((str(small.parent / f"{name}.py"),)) for name in scripts}
    entered["nowhere"] = Contestant((), peer="nowhere")
    monkeypatch.setattr(race, "CONTESTANTS", entered)
    monkeypatch.setattr(race, "ENVIRONMENTS", small.parent / "environments")
    monkeypatch.setattr(environments, "PINS", small.parent)
    (small.parent / "nowhere.txt").write_text("nowhere @ file:///no/such/wheel.whl # nowhere==1.0")
    rows = raced(small, "--queries 1 3 --runs 2 --memory 2", "crashes", "nowhere", "greedy", OURS)
    assert [row.shape["queries"] for row in rows] == [1, 3]
    for row in rows:
        assert row.failed.keys() == {"nowhere", "crashes", "greedy"}
        assert row.failed["crashes"] == "a | b"
        assert row.failed["nowhere"].startswith("not installed: ERROR: wheel.whl is not a valid")
        assert row.failed["greedy"] == "MemoryError"
        assert row.seconds.keys() == {OURS}
        assert len(row.samples[OURS]) == 2
        assert row.details["stages"][OURS].keys() == {"scan"}
        assert row.details["memory_bytes"] == 2 << 30
    assert not (small.parent / "crashes").exists()
    assert "first" in capsys.readouterr().err
    shown = tables.race(rows).splitlines()
    assert shown[2].startswith("| small, 1 blocks, 24 fitted, 36 scored, 1 queries | ours |")
    assert "| | crashes | failed | | | | a \\| b |" in shown


def test_a_race_without_ours_has_no_rho(small: Path, monkeypatch) -> None:
    script = small.parent / "alone.py"
    script.write_text(ARRIVES)
    monkeypatch.setattr(race, "CONTESTANTS", {"alone": Contestant((str(script),))})
    (row,) = raced(small, "--queries 2", "alone")
    assert row.details["spearman"] == {}
    assert tables.race([row]).splitlines()[2].count("| |") == 2


def test_the_fastest_comes_first() -> None:
    row = Row(
        "race", "small", "job", {"fit": 1, "scan": 2, "queries": 3, "blocks": 4},
        seconds={OURS: 2.0, "kronfluence": 3.0, "bergson": 1.0},
        extra_bytes=dict.fromkeys((OURS, "kronfluence", "bergson"), 2**30),
        details={
            "stages": {OURS: {"fit": 2.0}, "kronfluence": {"fit": 3.0}, "bergson": {"fit": 1.0}},
            "spearman": {OURS: 1.0, "kronfluence": 0.9, "bergson": 0.8},
            "versions": {"bergson": "2.5.1"},
        },
        environment={"cpu": "Some CPU"},
    )  # fmt: skip
    lines = tables.race([row]).splitlines()
    shown = [line.split(" | ")[1] for line in lines[2:5]]
    assert shown == ["bergson 2.5.1", OURS, "kronfluence"]
    assert "| 1000 ms | 3.00x | 1.0 | 0.800 |" in lines[2]


def test_a_job_is_what_was_asked_for(small: Path) -> None:
    task = small.parent / "job.json"
    shape = {"fit": 20, "scan": 12, "queries": 4}
    job.write(task, small, blocks=30, memory=1, **shape)
    with pytest.raises(SystemExit, match="has 60 sequences, 61 are asked for"):
        job.write(task, small, fit=57, scan=12, queries=4, blocks=1, memory=1)
    found = json.loads(task.read_text())
    assert [len(found[x]) for x in shape] == [20, 12, 4]
    assert len(found["layers"]) == 6
    assert found["weights"] == 6 * 16 * 24
    asked = [x["input_ids"] for x in found["queries"]]
    assert not [x for x in asked if x in found["fit"]]
    assert found["queries"][0]["labels"] == [-100] * 24 + asked[0][24:]


def test_dense_queries_fit_a_quarter_of_the_memory() -> None:
    given = {"queries": [None] * 10, "weights": 100}
    assert job.dense_at_once({**given, "memory": 4 * 400 * 3}) == 3
    assert job.dense_at_once({**given, "memory": 1 << 40}) == 10
    assert job.dense_at_once({**given, "memory": 1}) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL"),
        ("import os; os._exit(3)", "ended with 3"),
        ("raise ValueError('no\\n\\n  such layer  ')", "such layer"),
    ],
)
def test_the_last_line_of_an_error(text, reason) -> None:
    with pytest.raises(environments.Failed, match=f"^{reason}$"):
        environments.said([sys.executable, "-c", text])


def wheel(folder: Path, version: str) -> Path:
    """A package of one module that says its version."""
    path = folder / f"peer-{version}-py3-none-any.whl"
    info = f"peer-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("peer.py", f"version = {version!r}")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: peer\nVersion: {version}")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
        file.writestr(f"{info}/RECORD", "")
    return path


def test_an_environment_is_made_once_and_sees_our_torch(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(environments, "PINS", tmp_path)
    for version in ("1.0", "2.0"):
        pins = f"{wheel(tmp_path, version)} # peer=={version}"
        (tmp_path / "peer.txt").write_text(pins)
        python = environments.python("peer", tmp_path / "made")
        told = environments.said(
            [python, "-c", "import peer, torch; print(peer.version, torch.__file__)"]
        )
        assert told.split() == [version, torch.__file__]
        assert environments.version("peer") == version
        written = Path(python).lstat().st_mtime_ns
        assert environments.python("peer", tmp_path / "made") == python
        assert Path(python).lstat().st_mtime_ns == written
