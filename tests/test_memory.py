"""A memory budget changes how a job is done, not what it comes to: layers in parts, bases in files,
smaller batches.
"""

from contextlib import ExitStack

import pytest
import torch
from dense_ekfac import asked, corpus, gpt2, llama
from test_experts import MIXTRAL
from test_model_families import made

from ekfac_fast import fit, prepare_queries, score, self_scores
from ekfac_fast.checks import size
from ekfac_fast.curvature import memory
from ekfac_fast.curvature.memory import budget, free_bytes, give_back, taken_bytes, total_bytes
from ekfac_fast.curvature.offload import Mapped, fits
from ekfac_fast.errors import ArgumentError
from ekfac_fast.model.layers import select_layers
from ekfac_fast.ops.products import multiplied
from ekfac_fast.stages import budget as budgets
from ekfac_fast.stages import factors as factors_module
from ekfac_fast.stages import fit as fitting
from ekfac_fast.stages.budget import fitting_bytes, fitting_tokens, partitions
from ekfac_fast.stages.plan import plan
from ekfac_fast.stages.processes import Processes
from ekfac_fast.stages.run import Run
from ekfac_fast.store.files import load_tensors

CPU = torch.device("cpu")


def whole_job(model, out, **more):
    """Factors, scores and self-scores."""
    data = corpus(12)
    factors = fit(model, data, out=out / "fit", batch_tokens=60, **more)
    queries = prepare_queries(model, factors, asked(2), rank=4, **more)
    scores = score(model, queries, data, out=out / "scores", batch_tokens=60, **more)
    return factors, scores, self_scores(model, factors, data, out=out / "self", **more)


@pytest.fixture
def short(monkeypatch):
    """So little memory that a fit takes at least `count` parts, and no basis is kept."""

    def of(model, count):
        layers = select_layers(model)
        size = next(model.parameters()).element_size()
        every = [fitting_bytes(x, size) for x in layers]
        room = max(max(every), sum(every) // count)
        monkeypatch.setattr(fitting, "free_bytes", lambda device: int(room / budgets.SUMS))
        monkeypatch.setattr(factors_module, "free_bytes", lambda device: 0)

    return of


@pytest.mark.parametrize("kind", [gpt2, llama, lambda: made("Mixtral", **MIXTRAL)])
def test_in_parts_everything_is_bitwise_the_same(kind, tmp_path, short):
    model = kind().eval()
    whole = whole_job(model, tmp_path / "whole")
    short(model, 3)
    parts = whole_job(model, tmp_path / "parts")
    assert len(parts[0]._store.state["partitions"]) >= 2
    layers = parts[0].layers(model)
    dampings = parts[0].dampings(layers, None)
    places = {x.name: CPU for x in layers}
    held = factors_module.bases(parts[0], layers, dampings, torch.float32, places)
    assert all(isinstance(basis, Mapped) for basis in held.values())
    assert parts[0].identity == whole[0].identity
    left = {path.name for path in (tmp_path / "parts" / "fit").iterdir()}
    assert left == {path.name for path in (tmp_path / "whole" / "fit").iterdir()}
    for path in (tmp_path / "whole" / "fit").glob("*.safetensors"):
        got, want = load_tensors(tmp_path / "parts" / "fit" / path.name), load_tensors(path)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want), path.name
    for ours, theirs in zip(parts[1:], whole[1:], strict=True):
        assert (ours.matrix == theirs.matrix).all()
    states = [f._store.state for f in (parts[0], whole[0])]
    same = ("sequences", "truncated", "without_targets", "edge_draws", "parameters")
    assert [states[0][n] for n in same] == [states[1][n] for n in same]
    assert states[0]["seconds"].keys() == states[1]["seconds"].keys()


class Stopped(Exception):
    pass


def test_a_fit_in_parts_is_continued_in_the_same_parts(tmp_path, short, monkeypatch):
    """Stopped after a part, and while the parts are put together; with other memory meanwhile."""
    model, data = llama().eval(), corpus(12)
    whole = fit(model, data, out=tmp_path / "whole", batch_tokens=60)
    short(model, 3)

    def stop(stage, done, total):
        if stage == "eigenvalue" and 2 * done >= total:
            raise Stopped

    out, settings = tmp_path / "parts", {"batch_tokens": 60}
    with pytest.raises(Stopped):
        fit(model, data, out=out, progress=stop, **settings)
    begun = {path.name for path in out.iterdir() if path.is_dir()}
    assert begun
    monkeypatch.undo()
    saved = []

    def save(path, tensors):
        saved.append(path)
        if len(saved) == 4:
            raise Stopped
        save_tensors(path, tensors)

    from ekfac_fast.stages import partitions as parts
    from ekfac_fast.stages.partitions import save_tensors

    monkeypatch.setattr(parts, "save_tensors", save)
    with pytest.raises(Stopped):
        fit(model, data, out=out, **settings)
    monkeypatch.undo()
    again = fit(model, data, out=out, **settings)
    assert not [path for path in out.iterdir() if path.is_dir()]
    for name in whole:
        assert torch.equal(again[name].lam, whole[name].lam)
        assert torch.equal(again[name].Qa, whole[name].Qa)


def test_a_fit_that_was_begun_whole_goes_on_whole(tmp_path, short, monkeypatch):
    """Whatever is free when it is continued: its sums are of all layers."""

    def stop(stage, done, total):
        if stage == "eigenvalue":
            raise KeyboardInterrupt

    model, data = gpt2().eval(), corpus(12)
    with pytest.raises(KeyboardInterrupt):
        fit(model, data, out=tmp_path / "f", batch_tokens=60, progress=stop)
    short(model, 3)
    passes = []
    fit(model, data, out=tmp_path / "f", batch_tokens=60, progress=lambda *x: passes.append(x[0]))
    assert "covariance" not in passes


def test_parts_are_even_and_keep_modules_together():
    layers = select_layers(llama())
    bytes_of = [fitting_bytes(x, 4) for x in layers]
    (one,) = partitions(layers, sum(bytes_of), 4)
    assert one == layers
    two = partitions(layers, sum(bytes_of) - 1, 4)
    assert [[x.name for x in some] for some in two] == [
        [x.name for x in layers if f".{block}." in x.name] for block in (0, 1)
    ]
    alone = partitions(layers, max(bytes_of), 4)
    assert [x for some in alone for x in some] == layers
    assert all(sum(fitting_bytes(x, 4) for x in some) <= max(bytes_of) for some in alone)
    with pytest.raises(ArgumentError, match=r"layer model\.layers\.0\.mlp\.\w+ takes .* bytes"):
        partitions(layers, max(bytes_of) - 1, 4)


def test_a_budget_bounds_what_is_free():
    free, taken = free_bytes(CPU), taken_bytes(CPU)
    assert 0 < taken < free
    with budget(taken + (64 << 20)):
        assert 0 < free_bytes(CPU) <= 64 << 20
        held = torch.ones(40 << 18)
        assert free_bytes(CPU) <= 32 << 20
        with budget(1):
            assert free_bytes(CPU) == 0
        del held
    assert free_bytes(CPU) > free // 2


def test_a_budget_is_of_any_device_or_of_one_kind():
    free = free_bytes(CPU)
    with budget(1, "cuda"):
        assert free_bytes(CPU) > free // 2
    with budget(1, "cpu"):
        assert free_bytes(CPU) == 0


def test_budgets_of_two_threads_end_in_any_order():
    """What began first may end first."""
    taken, (first, second) = taken_bytes(CPU), (ExitStack(), ExitStack())
    first.enter_context(budget(taken + (64 << 20)))
    second.enter_context(budget(1))
    first.close()
    assert free_bytes(CPU) == 0
    second.close()
    assert free_bytes(CPU) > 64 << 20


V1_FILES = "memory/", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
V2_FILES = "", "memory.max", "memory.current", "inactive_file"


@pytest.mark.parametrize(
    ("line", "names"), [("3:cpu,memory:/jobs/7", V1_FILES), ("0::/jobs/7", V2_FILES)]
)
def test_a_control_group_bounds_what_is_free_and_its_pages_of_files_are(
    line, names, tmp_path, monkeypatch
):
    root, limit, used, inactive = names
    monkeypatch.setattr(memory, "GROUPS", tmp_path)
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "membership")
    (tmp_path / "membership").write_text(f"5:cpuset:/\n{line}\n")
    whole = free_bytes(CPU)

    def group(place, bound, taken, pages):
        folder = tmp_path / root / place
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit).write_text(f"{bound}\n")
        (folder / used).write_text(f"{taken}\n")
        active = inactive.replace("inactive", "active")
        (folder / "memory.stat").write_text(f"anon 5\n{inactive} {pages - 1}\n{active} 1\n")

    group("", "max" if names is V2_FILES else 1 << 62, 9 << 30, 0)
    assert free_bytes(CPU) > whole // 2
    group("jobs", 1000, 900, 800)
    assert free_bytes(CPU) == 900
    group("jobs/7", 500, 500, 300)
    assert free_bytes(CPU) == 300
    (tmp_path / "membership").write_text(line.replace("/jobs/7", "/of/the/host/jobs") + "\n")
    assert free_bytes(CPU) > whole // 2  # not to be seen from inside: the root is


@pytest.mark.parametrize(("gpus", "share"), [(8, 1), (4, 2), (3, 3)])
def test_processes_share_the_machine_and_a_gpu_only_where_they_have_to(gpus, share, monkeypatch):
    gpu = torch.device("cuda", 0)
    run = object.__new__(Run)
    run.memory, run.device, run.processes = None, gpu, Processes(0, 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (7200, 8000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    free = free_bytes(CPU)
    with run._own_share():
        assert free_bytes(gpu) == 7200 // share
        assert total_bytes(gpu) == (7200 // share if share > 1 else 8000)
        assert free / 10 < free_bytes(CPU) < free / 7
        with run._own_share():  # of a part of a fit
            assert free / 10 < free_bytes(CPU)
            assert free_bytes(gpu) == 7200 // share
    with budget(1000):
        assert total_bytes(gpu) == 1000
        assert fits((5, 5), torch.float32, gpu)  # 200 + 100 bytes, of which 500 may be taken
        assert not fits((10, 10), torch.float32, gpu)


def test_a_batch_fits_beside_the_weights(tmp_path):
    model = gpt2()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    few = fitting_tokens(model, weights + 400_000, 1024)
    assert 1 <= few < 1024 == fitting_tokens(model, 1 << 30, 1024)
    with pytest.raises(ArgumentError, match=f"the model's weights alone are {weights:,}"):
        fitting_tokens(model, weights, 1024)
    data = corpus(4)
    factors = fit(model, data, out=tmp_path / "f", memory="1GiB")
    assert factors.facts["batch_tokens"] == 1024


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("16GiB", 16 << 30), ("500MB", 500 * 10**6), ("1.5 GiB", 3 << 29), ("7", 7), (12, 12)],
)
def test_sizes(text, bytes_):
    assert size("memory", text) == bytes_


@pytest.mark.parametrize("wrong", ["", "much", "16 apples", "-1GiB", 0, -5, 1.5, True, "0"])
def test_no_sizes(wrong, tmp_path):
    with pytest.raises(ArgumentError, match=r"memory is .*, expected bytes, or a size such as"):
        fit(gpt2(), corpus(2), out=tmp_path / "f", memory=wrong)


def test_what_lies_freed_among_rows_that_stay_goes_back():
    tensors = [torch.ones(1 << 14) for _ in range(4000)]  # 64 KiB each, beside one another
    stay = tensors[::40]
    del tensors
    before = taken_bytes(CPU)
    give_back(CPU)
    assert before - taken_bytes(CPU) > 100 << 20  # of 256 MiB
    assert all(x.min() == 1 for x in stay)


def test_a_plan_counts_what_waits_and_what_is_widened():
    layers = select_layers(gpt2())
    sizes = {"parameters": 10_000, "sequences": 8, "tokens": 20, "fit_sequences": 12, "queries": 2}

    def memory(**more):
        stages = plan(layers, **sizes | more, rate=1e9, memory=1 << 30).stages
        return {x.name: x.memory for x in stages}

    one, few = memory(), memory(eigenvalue_examples=4)
    rows = 12 * 20 * 4 * sum(x.read + x.O for x in layers)
    assert one["covariance"] - few["covariance"] == rows
    assert one["eigendecomposition"] - few["eigendecomposition"] == rows
    # What waits is bounded by the memory, and what a pass holds by its tokens.
    many = memory(fit_sequences=1_000_000)
    assert (1 << 28) - rows < many["covariance"] - few["covariance"] < 1 << 29
    assert memory(head=1000)["scan"] == one["scan"]
    half = {"dtype": torch.float16}
    wider = 4000 * (not multiplied(torch.float16))
    assert memory(head=1000, **half)["scan"] - memory(**half)["scan"] == wider
