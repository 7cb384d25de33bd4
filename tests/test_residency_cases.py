"""Nothing goes to the device twice, and the host waits for it a few times a batch: proved without
one, by counting on a device that is not there. `test_residency.py` runs these cases.
"""

import os
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

if os.environ.get("PRETEND_DEVICE") != "1":
    pytest.skip("run by test_residency.py, in its own process", allow_module_level=True)

from dense_ekfac import asked, close, corpus, gpt2, llama
from pretend_device import NAME, _each, device, moved, told, watched
from torch import nn

from ekfac_fast import capture, fit, prepare_queries, score, self_scores
from ekfac_fast.curvature import choice, low_rank
from ekfac_fast.errors import ModelError
from ekfac_fast.stages import outgoing
from ekfac_fast.stages.run import Run
from ekfac_fast.stages.scan import DETAILED, LOWEST
from ekfac_fast.stages.waiting import Waiting
from ekfac_fast.store.folder import Store
from ekfac_fast.studies.scored import layer_scores
from ekfac_fast.validation.ablations import shampoo_factors
from ekfac_fast.validation.baselines import gradient_dot

RANK, TOKENS = 4, 40
SELECTIONS = {1: ["model.layers.0.mlp.down_proj"], 6: "mlp"}
# What a batch may cost, however many layers are tracked. To the device: the four tensors of a
# batch, the numbers that draw its labels, the queries that ask for its detail. From it: the result,
# or what labels are drawn by. The host waits for that, for where padding is, which positions
# predict, and the loss.
LIMITS = {
    "covariance": {"to": 5, "from": 1, "wait": 4},
    "eigenvalue": {"to": 5, "from": 1, "wait": 4},
    "queries": {"to": 4, "from": 1, "wait": 4},
    "scan": {"to": 4, "from": 1, "wait": 4},
    "detail": {"to": 5, "from": 1, "wait": 4},
}
# The eigendecomposition of a truncation: torch asks whether it converged.
SOLVES = 1


@pytest.fixture(scope="module", autouse=True)
def no_saving_between():
    """Passes save at their end alone, however long they take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "due", False)
        yield


def job(model, folder, layers="mlp", run=lambda step: step(None)):
    """Every stage of a small job; `run` is given each step, a function of a progress callback."""
    data, options = corpus(8), {"batch_tokens": TOKENS}

    def fitted(progress):
        return fit(model, data, out=folder / "f", layers=layers, progress=progress, **options)

    def prepared(rank, progress):
        return prepare_queries(model, factors, asked() * 5, rank=rank, progress=progress, **options)

    def scored(queries, progress):
        return score(
            model, queries, data, out=folder / f"{queries.rank}", per_token=True,
            progress=progress, **options,
        )  # fmt: skip

    def scored_themselves(progress):
        return self_scores(model, factors, data, out=folder / "s", progress=progress, **options)

    factors = run(fitted)
    low, full = (run(lambda p, rank=rank: prepared(rank, p)) for rank in (RANK, None))
    scores = [run(lambda p, queries=queries: scored(queries, p)) for queries in (low, full)]
    return SimpleNamespace(
        factors=factors, low=low, full=full, scores=scores, own=run(scored_themselves)
    )


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """By the number of tracked layers: results, and the traffic of each step of a job."""
    found = {}
    for count, layers in SELECTIONS.items():
        steps = []

        def run(step, steps=steps):
            with watched() as traffic:
                result = step(traffic.batch_done)
            steps.append(traffic)
            return result

        low_rank._random.cache_clear()
        with watched():
            model = moved(llama())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(choice, "FLOPS_OF_A_NUMBER", 0)  # so few queries are multiplied out
            found[count] = job(model, tmp_path_factory.mktemp("job"), layers, run), steps
    return found


def middle(steps, stage):
    """The batches between first and last of every pass of a stage: no warm-up, no saving."""
    batches = [b for traffic in steps for b in traffic.stages.get(stage, [])[1:-1]]
    assert len(batches) > 1
    return batches


def check(batches, limits, layers):
    for events in batches:
        counts = Counter(e.kind for e in events)
        assert counts.pop("solve", 0) <= SOLVES * layers, told(events)
        assert all(n <= limits.get(kind, 0) for kind, n in counts.items()), told(events)


@pytest.mark.parametrize("stage", LIMITS)
def test_what_a_batch_costs_is_fixed(jobs, stage):
    # What has waited for the eigenbasis has waited on the device.
    limits = {} if stage == "eigenvalue" else LIMITS[stage]
    for layers, (_, steps) in jobs.items():
        check(middle(steps, stage), limits, layers if stage == "queries" else 0)


def test_a_batch_that_could_not_wait_costs_what_the_first_pass_did(tmp_path, monkeypatch):
    monkeypatch.setattr(Waiting, "takes", lambda *_: False)
    with watched() as traffic:
        model = moved(gpt2())
        fit(model, corpus(), out=tmp_path, batch_tokens=TOKENS, progress=traffic.batch_done)
    for stage in ("covariance", "eigenvalue"):
        batches = middle([traffic], stage)
        check(batches, LIMITS[stage], 0)
        assert all(any(e.kind == "to" for e in batch) for batch in batches)


def test_sums_are_looked_at_together(jobs):
    for _, steps in jobs.values():
        last = steps[0].stages["covariance"][-1]
        waits = [e for e in last if e.kind == "wait" and e.place.startswith("stages/sums.py")]
        assert len(waits) == 1, told(last)


def bytes_to_device(traffic):
    """By the rooms that know of factors and queries; batches come from others."""
    events = [e for batches in traffic.stages.values() for batch in batches for e in batch]
    rooms = ("curvature/", "stages/")
    return sum(e.size for e in events if e.kind == "to" and e.place.startswith(rooms))


def nbytes(*tensors):
    return sum(x.nbytes for x in tensors if x is not None)


def test_factors_and_queries_go_to_the_device_once_a_stage(jobs):
    for result, steps in jobs.values():
        _, low, full, low_scores, full_scores, own = map(bytes_to_device, steps)
        factors = sum(nbytes(x.Qa, x.Qg, x.lam) for x in result.factors.values())
        assert full == own == factors
        # Random columns of a truncation: once for every width.
        widths = {x.layer.J: min(RANK + low_rank.OVERSAMPLING, x.layer.O, x.layer.J)
                  for x in result.low.layers}  # fmt: skip
        assert low == factors + sum(4 * J * columns for J, columns in widths.items())
        asking = 8 * len(result.low)
        # Query and sequence of every pair whose detail is kept.
        pairs = 2 * 8 * len(result.low) * (DETAILED + LOWEST)
        # The detail pass takes queries as they are kept, where the scan has them multiplied out.
        for got, queries, traffic, times in (
            (low_scores, result.low, steps[3], 2),
            (full_scores, result.full, steps[4], 1),
        ):
            sent = times * sum(nbytes(x.L, x.R, x.P) for x in queries.layers)
            assert sent < got <= sent + pairs + asking * len(traffic.stages["detail"])


def test_results_are_those_of_the_cpu(jobs, tmp_path):
    expected, (got, _) = job(llama(), tmp_path), jobs[6]
    for one, other in zip([*expected.scores, expected.own], [*got.scores, got.own], strict=True):
        np.testing.assert_allclose(one.matrix, other.matrix, rtol=1e-4, atol=1e-5)
    for one, other in zip(expected.scores, got.scores, strict=True):
        for a, b in zip(one.details(0), other.details(0), strict=True):
            np.testing.assert_allclose(a.per_layer_token, b.per_layer_token, rtol=1e-3, atol=1e-5)


def spread(model):
    """Its second block on the device: what accelerate's hooks do of a device map."""

    def carried(target):
        def carry(module, args, kwargs):
            return _each((args, kwargs), lambda x: x.to(target))

        carry.__module__ = "accelerate.hooks"  # no hook of a user's, which would be another model
        return carry

    inner = model.model
    moved(inner.layers[1]).register_forward_pre_hook(carried(device()), with_kwargs=True)
    inner.norm.register_forward_pre_hook(carried("cpu"), with_kwargs=True)
    model.hf_device_map = {"": "cpu", "model.layers.1": NAME}
    return model


def test_a_model_over_two_devices(tmp_path, monkeypatch):
    """Products of two devices are refused: what belongs to a layer is where it computes."""
    device()  # before the first backward pass
    places, own = [], Run.places

    def noted(self, layers):
        places.append(own(self, layers))
        return places[-1]

    monkeypatch.setattr(Run, "places", noted)
    expected = job(llama(torch.float64), tmp_path / "whole")
    places.clear()
    with watched():
        got = job(spread(llama(torch.float64)), tmp_path / "spread")
    for where in places:
        for name, found in where.items():
            assert found.type == (NAME if ".layers.1." in name else "cpu")
    for name, own in expected.factors.items():
        assert (own.lam - got.factors[name].lam).abs().max() < 1e-12 * own.lam.max()
    assert got.factors.identity == expected.factors.identity
    for one, other in zip([*expected.scores, expected.own], [*got.scores, got.own], strict=True):
        np.testing.assert_allclose(
            one.matrix, other.matrix, rtol=0, atol=1e-12 * np.abs(one.matrix).max()
        )
    for one, other in zip(expected.scores, got.scores, strict=True):
        for a, b in zip(one.details(0), other.details(0), strict=True):
            np.testing.assert_allclose(a.per_layer_token, b.per_layer_token, rtol=1e-6, atol=1e-10)


def others(model, folder):
    """What goes over data beside the main job, as numbers."""
    data, factors = corpus(5), fit(model, corpus(5), out=folder / "f")
    sets = prepare_queries(model, factors, asked(3), sets=["a", "a", "b"], rank=None)
    queries = prepare_queries(model, factors, asked(2), rank=None)
    with capture(model, queries=queries, covariances=True) as seen:
        ids = torch.tensor([x["input_ids"][:4] for x in data])
        model(input_ids=ids, labels=ids).loss.backward()
    taken = seen.take_covariances()
    shampoo = shampoo_factors(model, data, out=folder / "shampoo")
    return {
        "sets": torch.cat([x.dense().flatten() for x in sets.layers]),
        "dot": gradient_dot(model, asked(2), data),
        "cosine": gradient_dot(model, asked(2), data, cosine=True),
        "by layer": layer_scores(model, queries, data, out=folder / "layers").values,
        "in a loop": torch.cat([x.scores for x in seen.take_scores()], 1),
        "gradients in a loop": torch.cat([x.gradient.flatten().cpu() for x in taken.values()]),
        "shampoo": torch.cat([shampoo[name].lam.flatten() for name in shampoo]),
    }


def test_all_else_over_two_devices(tmp_path):
    device()
    expected = others(llama(torch.float64), tmp_path / "whole")
    with watched():
        got = others(spread(llama(torch.float64)), tmp_path / "spread")
    for name, x in expected.items():
        close(torch.as_tensor(np.asarray(got[name])), torch.as_tensor(np.asarray(x)), 1e-9)


def test_a_pass_is_given_whole_and_the_next_batch_read_meanwhile(tmp_path):
    class Watched(list):
        def __getitem__(self, index):
            traffic.add("read", "example")
            return super().__getitem__(index)

    with watched() as traffic:
        model = moved(gpt2())
        model.register_forward_hook(lambda *_: traffic.add("pass", "forward"))
        fit(
            model, Watched(corpus()), out=tmp_path, batch_tokens=TOKENS,
            progress=traffic.batch_done,
        )  # fmt: skip
    for events in middle([traffic], "covariance"):
        kinds = [e.kind for e in events]
        # The last wait of a batch is for its loss, and so for all of it.
        given = kinds[kinds.index("pass") :]
        assert given.pop() == "wait", told(events)
        assert "read" in given, told(events)
        assert "wait" not in given, told(events)


class Own(nn.Linear):
    """What a class of its own computes is looked at in every batch."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("layers", SELECTIONS.values())
def test_layers_are_checked_together(layers, tmp_path):
    with watched() as traffic:
        model = moved(llama())
        for block in model.model.layers:
            for module in block.mlp.children():
                if isinstance(module, nn.Linear):
                    module.__class__ = Own
        fit(
            model, corpus(), out=tmp_path / "f", layers=layers, batch_tokens=TOKENS,
            progress=traffic.batch_done,
        )  # fmt: skip
        batches, limits = middle([traffic], "covariance"), LIMITS["covariance"]
        check(batches, limits | {"from": limits["from"] + 1, "wait": limits["wait"] + 1}, 0)
        assert all(any(e.place.startswith("model/calls.py") for e in batch) for batch in batches)
        model.model.layers[1].mlp.down_proj.__class__ = Doubled
        with pytest.raises(ModelError, match=r"layers.1.mlp.down_proj \(Doubled\) does not"):
            fit(model, corpus(), out=tmp_path / "g", layers="mlp", batch_tokens=TOKENS)


def test_what_goes_out_together_comes_in_as_it_was(monkeypatch):
    tensors = {
        "a": torch.randn(3, 4).T, "b": torch.randn(2, dtype=torch.float64),
        "c": torch.randn(5, 1, 2), "d": torch.randn(0, 3),
    }  # fmt: skip
    for most, waits in (1 << 30, 2), (50, 3):
        monkeypatch.setattr(outgoing, "GATHERED", most)
        with watched() as traffic:
            found = outgoing.Outgoing()
            for name, x in tensors.items():
                found[name] = x.to(device())
            found["here"] = tensors["a"]
            assert found["c"].shape == (5, 1, 2)
            got = found.take()
            assert not found.take()
        assert sum(e.kind == "wait" for e in traffic.now) == waits, told(traffic.now)
        assert got.keys() == {*tensors, "here"}
        assert all(torch.equal(got[name], x) for name, x in tensors.items())


def test_the_device_counts():
    x, mask = torch.arange(6.0).view(2, 3), torch.tensor([True, False])
    with watched() as traffic:
        there, chosen = x.to(device()), mask.to(device())

        def seen(call):
            traffic.now = []
            call()
            return sorted(e.kind for e in traffic.now)

        assert there.device.type == NAME
        assert seen(lambda: there * 2 + 1) == []
        assert seen(lambda: torch.zeros(3, device=device())) == []
        assert seen(lambda: torch.zeros(3).to(device())) == ["to"]
        assert seen(lambda: there.cpu()) == ["from", "wait"]
        assert seen(lambda: there.to("cpu", torch.float64)) == ["from", "wait"]
        assert seen(lambda: there.tolist()) == ["from", "wait"]
        for read in (
            lambda: there.sum().item(), lambda: bool(there.any()), lambda: there.nonzero(),
            lambda: there[chosen], lambda: torch.equal(there, there), lambda: int(there[0, 1]),
            lambda: there.masked_select(chosen[:, None]),
            lambda: there.index_put((chosen,), torch.zeros((), device=device())),
        ):  # fmt: skip
            assert seen(read) == ["wait"]
        assert seen(lambda: there[[1, 0]]) == ["to"]
        assert seen(lambda: there[mask]) == ["to", "wait"]
        assert seen(lambda: torch.linalg.eigh(there @ there.mT)) == ["solve"]
        assert seen(lambda: there.mul_(2)) == []
        with pytest.raises(RuntimeError, match="of the CPU"):
            there + x
        assert torch.equal(there.cpu(), 2 * x)
    with pytest.raises(RuntimeError, match="nobody watches"):
        there + 1
    with pytest.raises(ZeroDivisionError), watched():
        backward_through(x.to(device()), lambda g: 1 / 0)


def backward_through(x, hook):
    product = x.requires_grad_() * 2
    product.register_hook(hook)
    product.sum().backward()
