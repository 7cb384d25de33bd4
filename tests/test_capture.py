"""What models do with their layers: every sequence's gradient is right, or the layer is refused."""

import threading

import pytest
import torch
from dense_ekfac import gpt2
from small_networks import WIDTH, Net, assert_equal, captured, expected, sequences
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Llama4ForCausalLM, Llama4TextConfig

from ekfac_fast import Notice, fit
from ekfac_fast.errors import ModelError
from ekfac_fast.model.capture import Capture
from ekfac_fast.model.layers import select_layers


def plain(net, x):
    return net.b(torch.tanh(net.a(x)))


BODIES = {
    "plain": plain,
    "changed in place after the first layer": lambda net, x: net.b(torch.relu_(net.a(x))),
    "checkpointed": lambda net, x: checkpoint(plain, net, x, use_reentrant=False),
    "checkpointed by re-entry": lambda net, x: checkpoint(plain, net, x, use_reentrant=True),
    "positions first": lambda net, x: plain(net, x.transpose(0, 1)).transpose(0, 1),
    "tokens as rows": lambda net, x: plain(net, x.flatten(0, 1)).view_as(x),
    "tokens as rows, positions first": lambda net, x: (
        plain(net, x.transpose(0, 1).flatten(0, 1)).view(x.shape[1], x.shape[0], -1).transpose(0, 1)
    ),
    "one input for both": lambda net, x: torch.tanh(net.a(x)) * net.b(x),
    "an axis more": lambda net, x: plain(net, x.unsqueeze(2).expand(-1, -1, 3, -1)).mean(2),
}
LENGTHS = {"different": (12, 5, 9, 7), "as many as tokens": (6, 6, 6, 6, 6, 6), "one": (8,)}


# torch says so of the first pass of a checkpoint by re-entry, after which we begin at the inputs.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("body", BODIES)
def test_gradients_are_those_of_the_parameters(body, lengths):
    model, data = Net(BODIES[body]), sequences(*LENGTHS[lengths])
    names = ["a", "b"]
    # autograd.grad and a checkpoint by re-entry do not go together: its gradients are the plain
    # ones.
    same = Net(plain) if "re-entry" in body else model
    assert_equal(captured(model, data, names), expected(same, data, names))


def test_layers_that_share_an_input_but_not_a_bias():
    model = Net(BODIES["one input for both"], bias=(True, False))
    data = sequences(12, 5, 9)
    assert_equal(captured(model, data, ["a", "b"]), expected(model, data, ["a", "b"]))


@pytest.mark.parametrize("body", [
    lambda net, x: net.a(torch.tanh(net.a(x))),
    lambda net, x: net.a(torch.tanh(net.a(torch.tanh(net.a(x.flatten(0, 1)))))).view_as(x),
    lambda net, x: net.a(torch.tanh(net.a(x))) * net.b(x),  # a's first input is b's as well
])  # fmt: skip
def test_a_layer_used_several_times_is_one_parameter(body):
    model, data = Net(body), sequences(12, 5, 9)
    names = ["a", "b"] if "b" in body.__code__.co_names else ["a"]
    assert_equal(captured(model, data, names), expected(model, data, names))


def test_looped_layers_are_fitted_with_their_masks(tmp_path):
    model = Net(lambda net, x: net.a(torch.tanh(net.a(x))))
    data = sequences(12, 5, 9)
    factors = fit(model, data, out=tmp_path, layers=["a"])
    assert factors.tokens == 2 * (12 + 5 + 9)


def test_a_layer_that_does_not_reach_the_loss_is_zero():
    def body(net, x):
        net.seen = net.aux(torch.tanh(net.a(x)))
        return plain(net, x)

    model, data = Net(body), sequences(12, 5)
    with pytest.warns(Notice, match="layer aux does not reach the loss: its gradient is zero"):
        found = captured(model, data, ["a", "aux", "b"])
    assert not found["aux", 1].any()
    assert_equal({k: x for k, x in found.items() if k[0] != "aux"},
                 expected(model, data, ["a", "b"]))  # fmt: skip


def test_one_use_that_does_not_reach_the_loss():
    def body(net, x):
        net.seen = net.a(x)
        return net.a(torch.tanh(x))

    model, data = Net(body), sequences(12, 5)
    assert_equal(captured(model, data, ["a"]), expected(model, data, ["a"]))


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_gradients_switched_off_around_a_call(off, tmp_path):
    model, data = Net(plain), sequences(12, 5)
    with off():
        got = captured(model, data, ["a"])
    assert_equal(got, expected(model, data, ["a"]))


def test_gradients_switched_off_inside_the_model():
    def body(net, x):
        with torch.no_grad():
            h = net.a(x)
        return net.b(h)

    with pytest.raises(ModelError, match="layer a runs where the model has switched gradients off"):
        captured(Net(body), sequences(5, 4), ["a", "b"])


class Pair(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y.softmax(-1), y


class Twice(nn.Linear):
    def __init__(self, *sizes, pair=False):
        super().__init__(*sizes)
        self.pair = pair

    def forward(self, x):
        y = 2 * super().forward(x)
        return (y, y) if self.pair else y


class Beside(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y.softmax(-1), y.clone()


class Named(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return {"logits": y, "input": x, "best": y.argmax(-1)}


def test_layers_of_a_class_of_their_own():
    model = Net(lambda net, x: net.b(net.a(x)[0]))
    for kind, message in (
        (Beside, r"layer a \(Beside\) returns a tuple.* another output is made of W x \+ b beside"),
        (lambda *sizes: Twice(*sizes, pair=True), r"layer a \(Twice\).* 0 of its outputs are W x"),
    ):
        model.a = kind(WIDTH, WIDTH).double()
        with pytest.raises(ModelError, match=message):
            captured(model, sequences(5, 4), ["a"])
    model = Net(plain)
    model.a = Twice(WIDTH, WIDTH).double()
    with pytest.raises(ModelError, match=r"layer a \(Twice\) does not compute W x \+ b"):
        captured(model, sequences(5, 4), ["a"])


@pytest.mark.parametrize("names", [["a"], ["a", "b"]])
@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (Pair, lambda net, x: net.b(net.a(x)[0] * net.a(x)[1])),
        (Named, lambda net, x: net.b(torch.tanh(net.a(x)["logits"]) + net.a(x)["input"])),
    ],
)
def test_a_layer_that_returns_its_product_and_what_it_made_of_it(kind, body, names):
    model, data = Net(body), sequences(12, 5, 9)
    model.a = kind(WIDTH, WIDTH).double()
    assert_equal(captured(model, data, names), expected(model, data, names))


def test_routers_return_logits_and_choices():
    config = Llama4TextConfig(
        vocab_size=97, hidden_size=16, intermediate_size=24, intermediate_size_mlp=24,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        num_local_experts=4, num_experts_per_tok=2, interleave_moe_layer_step=1, pad_token_id=0,
    )  # fmt: skip
    model, data = Llama4ForCausalLM(config).eval(), sequences(12, 5, 9)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    routers = [layer.name for layer in select_layers(model, "*.router")]
    assert len(routers) == 2
    assert_equal(captured(model, data, routers), expected(model, data, routers), 1e-4)


def test_rows_that_belong_to_no_sequence_are_refused():
    def body(net, x):
        chosen = x.flatten(0, 1)[::3]  # as an expert sees some of the tokens
        return x + net.a(chosen).mean(0)

    with pytest.raises(ModelError, match=r"layer a: its input is \[\d+, 16\].*cannot be told"):
        captured(Net(body), sequences(12, 12), ["a"])


def test_shared_parameters_are_refused_or_added():
    model, data = Net(plain, bias=(False, False)), sequences(12, 5)
    model.b.weight = model.a.weight
    with pytest.raises(ValueError, match=r"layer a shares a parameter with b.*shared_parameters"):
        select_layers(model, ["a", "b"])
    got = captured(model, data, ["a", "b"], shared=True)
    assert_equal(got, expected(model, data, ["a"]))


def test_a_head_tied_to_the_embedding_is_refused_or_added():
    model, data = gpt2(torch.float64).eval(), sequences(12, 5, 9)
    data = [{"input_ids": x["input_ids"] % 61} for x in data]
    with pytest.raises(
        ValueError, match=r"layer lm_head shares .* with transformer\.wte.*shared_par"
    ):
        select_layers(model, ["lm_head"])
    with pytest.warns(Notice, match="layer lm_head has the parameters of"):
        assert len(select_layers(model, "all")) == 8
    assert len(select_layers(model, "all", shared=True)) == 9
    want = expected(model, data, ["lm_head"])
    assert_equal(captured(model, data, ["lm_head"], shared=True), want)
    assert_equal(captured(model, data, ["lm_head"], shared=True, batch_tokens=1), want)


def test_embeddings_that_change_what_they_look_up_are_refused_as_a_heads_other_half():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return 4 * super().forward(ids)

    model = Net(plain)
    model.head = nn.Linear(WIDTH, 97, bias=False).double()
    for emb in (Scaled(97, WIDTH), nn.Embedding(97, WIDTH, max_norm=1.0)):
        model.emb = emb.double()
        model.head.weight = emb.weight
        with pytest.raises(ValueError, match=r"layer head .*\(cannot be tracked together"):
            select_layers(model, ["head"], shared=True)


def test_a_tied_head_with_a_padding_index_and_two_embeddings():
    def body(net, x):
        return plain(net, x) + net.other(net.ids)

    model, data = Net(body), sequences(12, 5, 9)
    model.other = nn.Embedding(97, WIDTH, padding_idx=int(data[0]["input_ids"][3])).double()
    model.emb.register_forward_pre_hook(lambda _, args: setattr(model, "ids", args[0]))
    model.head = nn.Linear(WIDTH, 97, bias=False).double()
    model.head.weight = model.other.weight = model.emb.weight
    model.again = model.emb  # one module of two names
    got = captured(model, data, ["head", "a"], shared=True)
    assert_equal(got, expected(model, data, ["head", "a"]))


def test_two_threads_with_one_model_wait_for_each_other():
    model, names = Net(plain), ["a", "b"]
    data = [sequences(12, 5, 9, seed=seed) for seed in range(4)]
    want = [expected(model, x, names) for x in data]
    got: list = [None] * 4

    def work(at):
        for _ in range(5):
            got[at] = captured(model, data[at], names)

    threads = [threading.Thread(target=work, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, right in zip(got, want, strict=True):
        assert_equal(mine, right)


def test_hooks_and_modes_are_undone_when_a_pass_fails():
    model = Net(plain).train()

    def loss():
        model(torch.zeros(1, 3, dtype=torch.int64))
        raise KeyError("of the user's own")

    with pytest.raises(KeyError):
        Capture(model, select_layers(model, ["a"]))(loss, lambda _: None)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
