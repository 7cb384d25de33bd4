"""Captured in a training loop: the scores of `score`, sums by autograd, gradients left alone."""

import gc
import weakref

import peft
import pytest
import torch
from dense_ekfac import asked, close, gpt2, llama, weight_gradient
from loops import DATA, batch, body, checkpointed, count, hooks, loss_of, made, mean
from small_networks import Net
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GPT2LMHeadModel

from ekfac_fast import capture, fit, prepare_queries, score
from ekfac_fast.errors import ModelError, Notice
from ekfac_fast.model.layers import select_layers
from ekfac_fast.store.fingerprint import fingerprint


def tolerance(model):
    """Llama's norms are fp32 in any model."""
    return 1e-10 if isinstance(model, GPT2LMHeadModel) else 1e-6


@pytest.fixture(scope="module", params=[llama, gpt2], ids=["llama", "gpt2"])
def world(request, tmp_path_factory):
    return made(request.param(torch.float64), tmp_path_factory.mktemp("loop"))


def gradients(model):
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def captured(model, loop, **how):
    """What is captured of a loop whose gradients are seen to be those without."""
    loop(None)
    before, own = gradients(model), hooks(model)
    with capture(model, **how) as found:
        loop(found)
        after = gradients(model)
        scores = found.take_scores() if how.get("queries") else []
        sums = found.take_covariances() if found.sums_covariances else None
    assert hooks(model) == own
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    return torch.cat([x.scores for x in scores], 1) if scores else None, sums


def plain(model):
    def loop(found):
        b = batch(DATA)
        loss = mean(model, b)
        if found:
            found.scale = count(b)
        loss.backward()

    return loop


def accumulated(model):
    """Batches of other numbers of tokens; the loss scaled as a gradient scaler does."""

    def loop(found):
        for part in (DATA[:2], DATA[2:3], DATA[3:]):
            b = batch(part)
            if found:
                found.scale = count(b) * 3 / 1024
            (mean(model, b) / 3 * 1024).backward()

    return loop


def together(model):
    """Two forward passes, and one backward pass."""

    def loop(found):
        loss = mean(model, batch(DATA[:2])) + mean(model, batch(DATA[2:]))
        with torch.no_grad():
            mean(model, batch(DATA))
        if found:
            found.scale = 1.0
        loss.backward()

    return loop


@pytest.mark.parametrize("loop", [plain, accumulated])
@pytest.mark.parametrize("kind", [None, "checkpoint", "reentrant"])
def test_scores_are_those_of_score(world, loop, kind):
    model, queries, expected = world
    with checkpointed(model, kind):
        found, _ = captured(model, loop(model), queries=queries)
    close(found, expected, tolerance(model))


def test_passes_that_share_a_backward_pass(world):
    model, queries, expected = world
    found, _ = captured(model, together(model), queries=queries)
    counts = [count(batch(part)) for part in (DATA[:2], DATA[2:])]
    close(found[:, :2] * counts[0], expected[:, :2], tolerance(model))
    close(found[:, 2:] * counts[1], expected[:, 2:], tolerance(model))


def test_the_models_own_loss_tells_the_scale(world):
    """transformers computes it in fp32."""
    model, queries, expected = world

    def loop(_):
        (model(**batch(DATA[:2])).loss / 7).backward()
        items = count(batch(DATA)) * 5
        loss = model(**batch(DATA[2:]), num_items_in_batch=items).loss
        loss *= 2  # as Trainer does with several processes
        loss.backward()

    found, _ = captured(model, loop, queries=queries)
    close(found, expected, 1e-6)


def test_autocast(world, tmp_path):
    model, queries, expected = world
    model = type(model)(model.config).float()
    model.load_state_dict(world[0].state_dict())

    def loop(_):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch(DATA)).loss
        loss.backward()

    with pytest.warns(Notice, match="not those that the queries were prepared on"):
        found, _ = captured(model.eval(), loop, queries=queries)
    close(found, expected, 0.05)


@pytest.mark.parametrize("loop", [plain, accumulated])
def test_covariances_are_sums_over_tokens_by_autograd(world, loop):
    model = world[0]
    _, found = captured(model, loop(model))
    layers = {x.name: x for x in select_layers(model)}
    expected, seen = dict.fromkeys(layers), {}
    handles = [
        model.get_submodule(n).register_forward_hook(
            lambda _, args, y, n=n: seen.update({n: (args[0], y)})
        )
        for n in layers
    ]
    for example in DATA:
        b = batch([example])
        loss = mean(model, b) * count(b)
        outputs = torch.autograd.grad(loss, [y for _, y in seen.values()])
        for (n, (x, _)), g in zip(seen.items(), outputs, strict=True):
            a, g = x.detach()[0], g[0]
            a = torch.cat([a, a.new_ones(len(a), 1)], 1) if layers[n].bias else a
            expected[n] = [s + t.T @ t for s, t in zip(expected[n] or (0, 0), (a, g), strict=True)]
    for handle in handles:
        handle.remove()
    tokens = sum(len(x["input_ids"]) for x in DATA)
    assert found.keys() == layers.keys()
    for name, x in found.items():
        close(x.activation, expected[name][0], tolerance(model))
        close(x.gradient, expected[name][1], tolerance(model))
        assert x.activation_tokens == x.gradient_tokens == tokens


def test_gradients_that_overflow_are_left_out_and_seen(world):
    model, queries, _ = world

    def loop(scale):
        (mean(model, batch(DATA[:1])) * scale).backward()
        model.zero_grad()

    with capture(model, queries=queries, covariances=True, scale=1.0) as found:
        loop(1.0)
        loop(float("inf"))
        one, other = found.take_scores()
        with pytest.warns(Notice, match="were not finite"):
            sums = found.take_covariances()
    assert one.scores.isfinite().all()
    assert not other.scores.isfinite().any()
    assert all(x.gradient.isfinite().all() for x in sums.values())
    n = len(DATA[0]["input_ids"])
    assert {(x.activation_tokens, x.gradient_tokens) for x in sums.values()} == {(2 * n, n)}


def test_which_sequence_a_column_is(world):
    model, queries, _ = world
    with capture(model, queries=queries, scale=1.0) as found:
        mean(model, batch(DATA)).backward()
        (seen,) = found.take_scores()
        assert found.take_scores() == []
    model.zero_grad()
    assert seen.sequences == [fingerprint(torch.tensor(x["input_ids"])) for x in DATA]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_that_trains(tmp_path):
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(llama(torch.float64), config)
    factors = fit(model, DATA, out=tmp_path / "f")
    queries = prepare_queries(model, factors, asked(2), rank=2)
    expected = torch.tensor(score(model, queries, DATA, out=tmp_path / "s").matrix)
    model.train()
    found, _ = captured(model, accumulated(model), queries=queries)
    close(found, expected, tolerance(model))
    truth = 0
    for own in queries.layers:
        each = []
        for example in DATA:
            loss = mean(model, b := batch([example])) * count(b)
            each.append(weight_gradient(model, own.layer.name, loss))
        truth += torch.einsum("qoj,boj->qb", own.dense(), torch.stack(each))
    close(found, truth, tolerance(model))


def test_a_network_that_is_no_language_model():
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 3)).double()
    x, y = torch.randn(4, 5).double(), torch.tensor([0, 1, 2, 0])

    def loop(_):
        F.cross_entropy(net(x), y).backward()

    _, found = captured(net, loop, layers="all", scale=4.0)
    a = torch.cat([x, torch.ones(4, 1)], 1)
    close(found["0"].activation, a.T @ a, 1e-12)
    g = (net(x).softmax(1) - F.one_hot(y, 3)).detach()
    close(found["2"].gradient, g.T @ g, 1e-12)
    assert found["2"].gradient_tokens == 4


def test_a_pass_without_a_backward_pass_is_forgotten(world):
    model, queries, _ = world
    with capture(model, queries=queries, scale=1.0) as found:
        loss = mean(model, batch(DATA))
        one = weakref.ref(found._watch._current)
        found._watch._current = None
        gc.disable()
        try:
            del loss
            assert one() is None
        finally:
            gc.enable()
        assert found.take_scores() == []


def test_a_frozen_layer_that_nothing_trains_before_is_refused():
    net = Net(body)
    for module in (net.emb, net.a):
        module.requires_grad_(False)
    with (
        pytest.raises(ModelError, match="layer a has no gradient in this loop"),
        capture(net, "a", scale=1.0),
    ):
        loss_of(net, batch(DATA))
    net.emb.requires_grad_(True)
    _, found = captured(net, lambda _: loss_of(net, batch(DATA)).backward(), layers="a", scale=1.0)
    assert found["a"].gradient.abs().max() > 0


def test_a_layer_that_is_not_reached_counts_as_zero():
    net = Net(lambda n, x: n.a(x) + 0 * n.b(x).detach())
    with capture(net, ["a", "b"], scale=1.0) as found:
        loss_of(net, batch(DATA)).backward()
        with pytest.warns(Notice, match="layer b does not reach"):
            sums = found.take_covariances()
    assert sums["b"].gradient.abs().max() == 0 < sums["b"].activation.abs().max()


def test_a_checkpoint_keeps_no_more_than_without(world):
    """What a layer inside reads is dropped with the forward pass, and computed again."""
    net, alive = Net(body), []

    def inside(x):
        h = torch.relu(net.a(x))
        alive.append(weakref.ref(h))
        return net.b(h)

    net.body = lambda n, x: checkpoint(inside, x, use_reentrant=False)
    with capture(net, ["a", "b"], scale=1.0) as found:
        loss = loss_of(net, batch(DATA))
        assert alive[0]() is None
        loss.backward()
        assert found.take_covariances().keys() == {"a", "b"}
    assert len(alive) == 2
