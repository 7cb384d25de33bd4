"""What a fit leaves on disk: covariances that are dropped, shared inputs stored once, eigenvectors
in bf16, and how many bytes that is, at the end and at most.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from dense_ekfac import asked, close, corpus, gpt2, llama
from safetensors.torch import save_file
from scipy.stats import spearmanr
from test_kronfluence_files import examples, theirs, theirs_scored
from typer.testing import CliRunner

from ekfac_fast import Factors, export_factors, fit, prepare_queries, score, self_scores
from ekfac_fast.cli import app
from ekfac_fast.errors import ArgumentError, StoreError
from ekfac_fast.model.layers import select_layers
from ekfac_fast.stages import disk
from ekfac_fast.stages import fit as fitting
from ekfac_fast.stages.factors import COVARIANCES, EIGENVALUES, EIGENVECTORS
from ekfac_fast.stages.plan import plan
from ekfac_fast.store import files
from ekfac_fast.store.files import load_tensors
from ekfac_fast.store.folder import Pieces, Store
from ekfac_fast.validation.ablations import kfac_factors

BF16, TOKENS = torch.bfloat16, 40


def chosen():
    """A Llama block's layers: gate and up read one tensor, and so do q, k and v."""
    return select_layers(llama(), "model.layers.0.*")


def everything():
    return [x.name for x in chosen()]


def fitted(out, model=None, **more):
    more = {"batch_tokens": TOKENS} | more
    return fit(model or llama(), corpus(), out=out, layers=everything(), **more)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same factors with their covariances and without."""
    folder = tmp_path_factory.mktemp("disk")
    return [fitted(folder / str(keep), keep_covariances=keep) for keep in (True, False)]


def equal(ours, theirs):
    for name in theirs:
        for part in ("lam", "Qa", "Qg"):
            assert torch.equal(getattr(ours[name], part), getattr(theirs[name], part)), name


def bytes_in(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_what_layers_share_is_stored_once(both):
    kept, dropped = both
    equal(dropped, kept)
    assert dropped.identity == kept.identity
    names = set(everything())
    owners = {n for n in names if not n.endswith(("k_proj", "v_proj", "up_proj"))}
    for side in EIGENVECTORS:
        for name in (EIGENVECTORS[side], EIGENVALUES[side]):
            stored = set(load_tensors(dropped.folder / name))
            assert stored == (owners if side == "activation" else names)
            assert set(load_tensors(kept.folder / name)) == names
    layer = "model.layers.0.mlp.up_proj"
    assert dropped[layer].Qa is dropped["model.layers.0.mlp.gate_proj"].Qa
    assert kept.has_covariances
    assert not dropped.has_covariances
    assert not [x for x in COVARIANCES.values() if (dropped.folder / x).exists()]
    assert {*kept.stored(COVARIANCES["activation"])} == names
    with pytest.raises(StoreError, match=r"gradient_covariance.* were dropped .* Fit again"):
        dropped.stored(COVARIANCES["gradient"])


def test_scores_and_baselines_do_not_notice(both, tmp_path):
    found = []
    for i, factors in enumerate(both):
        model, out = llama(), tmp_path / str(i)
        queries = prepare_queries(model, factors, asked(), rank=None)
        kfac = kfac_factors(factors, out / "kfac")
        made = (
            score(model, queries, corpus(), out=out / "s"),
            self_scores(model, factors, corpus(), out=out / "own"),
            self_scores(model, kfac, corpus(), out=out / "kfac own"),
        )
        found.append([x.matrix for x in made])
    assert all((a == b).all() for a, b in zip(*found, strict=True))


def test_a_gradient_matrix_that_is_missing_is_nobody_elses(both, tmp_path):
    """Only inputs are shared."""
    shutil.copytree(both[1].folder, tmp_path / "f")
    file, layer = tmp_path / "f" / EIGENVECTORS["gradient"], "model.layers.0.mlp.up_proj"
    left = {n: x.clone() for n, x in load_tensors(file).items() if n != layer}
    save_file(left, file)  # kronfluence's, without a checksum of ours
    with pytest.raises(StoreError, match=rf"{EIGENVECTORS['gradient']} has no layer {layer}"):
        _ = Factors(tmp_path / "f")[layer]


def test_dropped_later_and_not_kept_again(both, tmp_path):
    shutil.copytree(both[0].folder, tmp_path / "f")
    fitted(tmp_path / "f")
    assert Factors(tmp_path / "f").has_covariances  # as they were
    again = fitted(tmp_path / "f", keep_covariances=False)
    assert not again.has_covariances
    equal(again, both[0])
    for folder in (again.folder, both[1].folder):
        with pytest.raises(StoreError, match=r"drops its covariances .* new folder"):
            fitted(folder, keep_covariances=True)
        fitted(folder)  # finished, and nobody asks
    with pytest.raises(ArgumentError, match="keep_covariances is 1"):
        fitted(tmp_path / "g", keep_covariances=1)


def test_by_themselves_large_ones_are_dropped(tmp_path, monkeypatch):
    layers = chosen()
    size = disk.matrix_bytes(layers, 4)
    for least, kept in ((size + 1, True), (size, False)):
        monkeypatch.setattr(disk, "KEPT_BELOW", least)
        assert fitted(tmp_path / str(kept)).has_covariances is kept
        assert planned(layers).keeps_covariances is kept


@pytest.mark.parametrize("moment", ["an eigendecomposition", "dropped", "the second pass", "moved"])
def test_killed_it_ends_in_the_same_bits(moment, both, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def killed(*args, **kwargs):
        raise Killed

    write, calls = Pieces.write, []

    def third(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise Killed
        write(self, *args)

    with monkeypatch.context() as patched:
        if moment == "an eigendecomposition":
            patched.setattr(Pieces, "write", third)
        elif moment == "dropped":  # all matrices are there, their covariances and files are not
            patched.setattr(fitting._Fit, "_write_eigenvectors", killed)
        elif moment == "the second pass":
            patched.setattr(fitting._Fit, "_bases", killed)
        else:  # noted as dropped, and still there
            patched.setattr("pathlib.Path.unlink", killed)
            patched.setattr(Store, "remove_state", lambda *args, **kwargs: None)
        with pytest.raises(Killed):
            fitted(tmp_path / "f", keep_covariances=False)
    assert not list((tmp_path / "f").glob("covariance_state*")) or moment == "moved"
    again = fitted(tmp_path / "f")
    equal(again, both[1])
    names = {path.name for path in both[1].folder.iterdir()}
    assert {path.name for path in (tmp_path / "f").iterdir()} == names


def test_diagonals_outlive_their_covariances(tmp_path, monkeypatch):
    """Killed where covariances are gone, and files of eigenvectors not yet there."""
    where = {"layers": ["model.embed_tokens", "lm_head:diagonal", "model.layers.0.mlp.*"]}
    kept = fit(llama(), corpus(), out=tmp_path / "kept", **where)
    with monkeypatch.context() as patched:
        patched.setattr(fitting._Fit, "_write_eigenvectors", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit(llama(), corpus(), out=tmp_path / "f", keep_covariances=False, **where)
    again = fit(llama(), corpus(), out=tmp_path / "f", **where)
    assert not again.has_covariances
    equal(again, kept)
    with pytest.raises(ArgumentError, match="lm_head has a covariance that is a diagonal"):
        export_factors(again, tmp_path / "theirs")


def test_in_parts(both, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "free_bytes", lambda device: 100_000)
    parts = fitted(tmp_path / "f", keep_covariances=False)
    assert len(parts._store.state["partitions"]) > 1
    equal(parts, both[1])
    for path in both[1].folder.glob("*.safetensors"):
        assert {*load_tensors(parts.folder / path.name)} == {*load_tensors(path)}, path.name


def test_rounded_eigenvectors_are_said_and_scores_follow_them(both, tmp_path):
    model, data = llama(), corpus(24)
    exact, rounded = (
        fit(model, data, out=tmp_path / str(x), layers=everything(), eigenvectors=x)
        for x in (None, BF16)
    )
    assert (exact.eigenvectors, rounded.eigenvectors) == (None, "bfloat16")
    for name in EIGENVECTORS.values():
        halves = [bytes_in_tensors(x.folder / name) for x in (rounded, exact)]
        assert 2 * halves[0] == halves[1]
    # lam is the mean square in the basis as it is stored.
    name = next(iter(exact))
    assert torch.equal(rounded[name].Qa, exact[name].Qa.to(BF16))
    assert not torch.equal(rounded[name].lam, exact[name].lam)
    close(rounded[name].lam, exact[name].lam, 2e-2)
    found = []
    for i, factors in enumerate((exact, rounded)):
        queries = prepare_queries(model, factors, asked(), rank=None, out=tmp_path / f"q{i}")
        found.append(score(model, queries, data, out=tmp_path / f"s{i}"))
    assert found[1].trust.eigenvectors == "bfloat16"
    assert "full rank; eigenvectors rounded to bfloat16; damping" in found[1].trust.line
    assert "rounded" not in found[0].trust.line
    for got, expected in zip(found[1].matrix, found[0].matrix, strict=True):
        assert spearmanr(got, expected).statistic > 0.995
    close(*(torch.tensor(np.array(x.matrix)) for x in found[::-1]), 2e-2)
    with pytest.raises(StoreError, match="eigenvectors: stored 'bfloat16', now '\\(none\\)'"):
        fit(model, data, out=rounded.folder, layers=everything())
    with pytest.raises(ArgumentError, match=r"eigenvectors is torch.float16, expected torch.bf"):
        fit(model, data, out=tmp_path / "h", eigenvectors=torch.float16)


def bytes_in_tensors(file):
    return sum(x.nbytes for x in load_tensors(file).values())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_kronfluence_scores_with_what_is_exported(tmp_path):
    names = [layer.name for layer in select_layers(llama())]
    data, queries = examples(12, 0), examples(3, 1, masked=4)
    analyzer = theirs(names, tmp_path)
    how = {"keep_covariances": False, "eigenvectors": BF16}
    factors = fit(llama(), data, out=tmp_path / "f", **how)
    exported = Factors(export_factors(factors, tmp_path / "run/factors_ours"))
    assert {exported[n].Qa.dtype for n in names} == {torch.float32}
    prepared = prepare_queries(llama(), factors, queries, rank=None)
    found = score(llama(), prepared, data, out=tmp_path / "s").matrix
    close(found, theirs_scored(analyzer, "ours", queries, data, "a"), 1e-5)
    with pytest.raises(StoreError, match="is a result folder of ours"):
        export_factors(factors, factors.folder)


def test_exported_with_covariances_it_is_the_folder_itself(both, tmp_path):
    kept, dropped = both
    export_factors(kept, tmp_path / "kept")
    export_factors(dropped, tmp_path / "dropped")
    for name in COVARIANCES.values():
        assert not (tmp_path / "dropped" / name).exists()
    files_of = [path.name for path in kept.folder.glob("*.safetensors") if path.name[0] != "p"]
    assert len(files_of) == 10
    for name in files_of:
        want = load_tensors(kept.folder / name)
        for folder in ("kept", *(["dropped"] if name not in COVARIANCES.values() else [])):
            got = load_tensors(tmp_path / folder / name)
            assert got.keys() == want.keys()
            assert all(torch.equal(got[n], want[n]) for n in want)
    arguments = json.loads((tmp_path / "dropped" / "factor_arguments.json").read_text())
    assert arguments["strategy"] == "ekfac"


def planned(layers, **more):
    sizes = {"parameters": 10_000, "sequences": 8, "tokens": 20, "fit_sequences": 12, "queries": 2}
    return plan(layers, **sizes, rate=1e9, **more)


@pytest.mark.parametrize(
    ("how", "room"),
    [
        ({"keep_covariances": True}, None),
        ({"keep_covariances": True}, 160_000),
        ({"keep_covariances": False}, None),
        ({"keep_covariances": False, "eigenvectors": BF16}, 160_000),
        ({"keep_covariances": False, "blocks": 2}, None),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*blocks do not divide")
def test_a_plan_of_the_disk_is_what_it_takes(how, room, tmp_path, monkeypatch):
    """Without layers that share anything; a state is saved after every batch."""
    most, sync = [0], files._sync

    def synced(path):
        if path.is_file():
            tensors = (x for x in tmp_path.rglob("*.safetensors") if x.is_file())
            most[0] = max(most[0], sum(x.stat().st_size for x in tensors))
        sync(path)

    monkeypatch.setattr(files, "_sync", synced)
    monkeypatch.setattr("ekfac_fast.store.folder.Pace.due", property(lambda self: True))
    if room:
        monkeypatch.setattr(fitting, "free_bytes", lambda device: room)
    layers = select_layers(gpt2())
    factors = fit(gpt2(), corpus(), out=tmp_path / "f", batch_tokens=TOKENS, **how)
    said = planned(layers, memory=None if room is None else room + 40_000, **how)
    parts = len(factors._store.state.get("partitions", [0]))
    assert parts == said.partitions == (1 if room is None else 2)
    ended = sum(path.stat().st_size for path in factors.folder.glob("*.safetensors"))
    slack = 600 * 11 + 1000  # headers of the files, the plan, counts
    assert 0 <= ended - said.factor_bytes < slack
    assert said.disk_bytes - slack < most[0] < said.disk_bytes + 2 * slack
    assert said.covariance_bytes == disk.matrix_bytes(layers, 4)


def test_commands(tmp_path, monkeypatch):
    from test_blocks import demo_files

    from ekfac_fast.cli import demo_small as demo

    demo_files(demo, tmp_path)
    where, out = [str(tmp_path / "model"), str(tmp_path / "corpus")], str(tmp_path / "f")

    def run(*words):
        done = CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "300"})
        assert done.exit_code == 0, done.output
        return done.output

    how = "--no-keep-covariances", "--eigenvectors", "bfloat16"
    said = run("fit", *where, "--out", out, *how)
    assert "covariances were dropped once they were decomposed" in said
    assert "eigenvectors rounded to bfloat16" in said
    said = run("export", out, "--out", tmp_path / "factors_theirs")
    assert "without covariances: they were dropped" in said
    assert len(Factors(tmp_path / "factors_theirs")) == 2
    said = [run("plan", where[0], "--sequences", 8, *more) for more in ((), how)]
    assert "GiB, kept\n" in said[0]
    assert "GiB, dropped once they are decomposed\n" in said[1]
