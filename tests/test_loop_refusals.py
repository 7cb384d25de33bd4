"""Loops of which nothing right can be captured: refused, by the name of the layer."""

import pytest
import torch
from dense_ekfac import gpt2
from loops import DATA, batch, checkpointed, hooks, loss_of, made, mean
from small_networks import Net

from ekfac_fast import capture
from ekfac_fast.errors import ArgumentError, ModelError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return made(gpt2(torch.float64), tmp_path_factory.mktemp("loop"))


@pytest.mark.parametrize(
    ("inside", "layers", "message"),
    [
        pytest.param(lambda n, x: n.a(n.a(x)), "a", "layer a ran twice", id="twice"),
        pytest.param(lambda n, x: n.a(x), "b", "layer b did not run", id="never"),
        pytest.param(
            lambda n, x: n.b(n.a(x).transpose(0, 1)).transpose(0, 1), "b",
            "which rows belong to which sequence", id="positions first",
        ),
        pytest.param(
            lambda n, x: n.b(x) + n.a(n.b.weight[:1, :1].detach().new_zeros(2, 16)).sum() * 0, "a",
            "which rows belong to which sequence", id="no rows of sequences",
        ),
        pytest.param(
            lambda n, x: n.a(x) + torch.no_grad()(n.b)(x), "b", "with gradients on", id="no grad"
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused(inside, layers, message):
    net = Net(inside)

    def loop():
        with capture(net, layers, scale=1.0) as found:
            found._watch.apart = True  # as with queries
            loss_of(net, batch(DATA)).backward()
            found.take_covariances()

    with pytest.raises(ModelError, match=message):
        loop()
    assert not any(one for one in hooks(net))


def test_loops_that_cannot_be_right_are_refused(world):
    model, queries, _ = world
    b = batch(DATA)

    def refused(message, loop, **how):
        own = hooks(model)
        with pytest.raises(ModelError, match=message), capture(model, queries=queries, **how):
            loop()
        model.zero_grad()
        assert hooks(model) == own

    refused(
        "has no loss of its labels in this loop: say by `scale`", lambda: mean(model, b).backward()
    )

    def twice():
        loss = mean(model, b)
        loss.backward(retain_graph=True)
        loss.backward()

    refused("two backward passes", twice, scale=1.0)
    block = model.get_submodule(queries.layers[0].layer.name)
    I = queries.layers[0].layer.I
    refused("ran outside of a pass", lambda: block(torch.ones(1, 1, I).double()), scale=1.0)

    model.loss_function = lambda logits, labels, **_: logits.square().mean()
    refused("it is another loss than their mean", lambda: model(**b).loss.backward())
    del model._loss_function

    def lost():
        model(**b).logits.sum().backward()

    refused("lost its own loss", lost)
    with checkpointed(model, "reentrant"):
        both = lambda: (mean(model, b) + mean(model, b)).backward()  # noqa: E731
        refused("use_reentrant=False", both, scale=1.0)
    block._compiled_call_impl = block.forward  # as `Module.compile` leaves it
    refused("mlp.* is compiled", lambda: None)
    block._compiled_call_impl = None


def test_arguments_that_cannot_be_right_are_refused(world):
    model, queries, _ = world
    own = [x.layer.name for x in queries.layers]

    def refused(message, *layers, **how):
        with pytest.raises(ArgumentError, match=message), capture(model, *layers, **how):
            pass

    refused("is not among the layers to capture", own[:1], queries=queries)
    refused("attn.c_attn is none of the queries'", [*own, "*.0.attn.c_attn"], queries=queries)
    refused("covariances=True", covariances=False)
    refused("scale is 'mean'", scale="mean")
    refused("queries is 3", queries=3)
    with (
        pytest.raises(ArgumentError, match="capture was given no queries"),
        capture(model) as found,
    ):
        found.take_scores()


def test_a_first_batch_without_labels_ends_no_loop(world):
    model, queries, _ = world
    b = batch(DATA)
    silent = b | {"labels": torch.full_like(b["labels"], -100)}
    with capture(model, queries=queries) as found:
        for each in (silent, b):
            model(**each, num_items_in_batch=torch.tensor(40)).loss.backward()
            (one,) = found.take_scores()
            assert bool(one.scores.any()) == (each is b)
    model.zero_grad()
