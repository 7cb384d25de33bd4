"""What is tried before a run, and what it and its folders are known by: nothing that changes an
answer goes unnoticed.
"""

from functools import partial

import numpy as np
import pytest
import torch
import transformers as T
from dense_ekfac import asked, close, corpus, gpt2
from plain_tasks import Plain
from test_disguises import brute
from torch import nn
from torch.nn import functional as F

from ekfac_fast import (
    Notice,
    SequenceClassificationTask,
    fit,
    prepare_queries,
    score,
    self_scores,
)
from ekfac_fast.data.batches import positions
from ekfac_fast.errors import ArgumentError, DataError, ModelError, StoreError
from ekfac_fast.model.identity import model_fingerprint, task_state
from ekfac_fast.store.files import load_tensors, save_tensors
from ekfac_fast.store.fingerprint import fingerprint

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def sentences(*lengths):
    rng = np.random.default_rng(0)
    return [{"input_ids": rng.integers(3, 60, n).tolist()} for n in lengths]


def test_positions_that_depend_on_the_longest_of_a_batch(tmp_path):
    """Phi-3's longrope turns a short sequence beside a long one as a long one."""
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8, "original_max_position_embeddings": 24,
    }  # fmt: skip
    network = T.Phi3ForCausalLM(
        T.Phi3Config(
            **SIZES, max_position_embeddings=256, original_max_position_embeddings=24,
            rope_parameters=rope,
        )
    ).double().eval()  # fmt: skip
    data = sentences(60, 9, 11, 10, 50, 12)
    with pytest.raises(ModelError, match=r"padding behind a sequence .* batch_tokens=1"):
        fit(network, data, out=tmp_path / "f")
    fit(network, data[1:4], out=tmp_path / "short")
    factors = fit(network, data, out=tmp_path / "alone", batch_tokens=1)
    queries = prepare_queries(network, factors, data[1:3], rank=None, batch_tokens=1)
    found = score(network, queries, data, out=tmp_path / "s", batch_tokens=1)
    close(torch.from_numpy(np.array(found.matrix)), brute(network, queries, data), 1e-6)


def test_a_model_that_a_short_sequence_sets_otherwise(tmp_path):
    """BigBird gives its sparse attention up at the first short one, and for good."""
    sizes = SIZES | {"num_random_blocks": 1, "block_size": 4, "attention_type": "block_sparse"}
    network = T.BigBirdForSequenceClassification(
        T.BigBirdConfig(**sizes, max_position_embeddings=256, num_labels=3)
    ).eval()
    labelled = [x | {"label": n % 3} for n, x in enumerate(sentences(64, 60, 8, 64))]
    how = {"task": SequenceClassificationTask(), "layers": ["*intermediate.dense"]}
    told = r"of 8 tokens has changed .*attention_type .* from 'block_sparse' to 'original_full'"
    with pytest.raises(ModelError, match=told):
        fit(network, labelled, out=tmp_path / "f", batch_tokens=1, **how)
    network.bert.set_attention_type("original_full")
    fit(network, labelled, out=tmp_path / "f", batch_tokens=1, **how)


def test_no_limit_of_positions():
    sizes = {"vocab_size": 50, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24}
    assert positions(T.XLNetForSequenceClassification(T.XLNetConfig(**sizes))) is None


def in_place(network):
    network.compile()
    return network


@pytest.mark.parametrize("how", [torch.compile, in_place])
def test_a_compiled_model_is_refused(how, tmp_path):
    network = how(gpt2().eval())
    with pytest.raises(ModelError, match=r"is compiled \(torch.compile\): .* as it was before"):
        fit(network, corpus(4), out=tmp_path / "f")


@pytest.mark.filterwarnings("ignore::ekfac_fast.errors.Notice")  # of blocks that do not divide
def test_whole_numbers_of_numpy(tmp_path):
    network, data = gpt2().eval(), corpus(6)
    counts = {"max_examples": np.int32(5), "blocks": np.int64(2)}
    found = fit(network, data, out=tmp_path / "a", eigenvalue_examples=np.int64(4), **counts)
    same = fit(network, data, out=tmp_path / "b", eigenvalue_examples=4, max_examples=5, blocks=2)
    assert found.facts == same.facts


class Net(nn.Module):
    """A user's own: attributes that its passes read, and some that they write."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.heads, self.window, self.scale = 2, (1, 2), torch.ones(8)
        self.register_buffer("mask", torch.ones(8), persistent=False)
        self.calls, self.seen = 0, None

    @torch.autocast("cpu", enabled=False)
    def forward(self, x):
        self.calls += 1
        h = self.fc(x).unflatten(-1, (self.heads, -1)).softmax(-1).flatten(-2)
        self.seen = h * self.scale.to(h.device) * self.mask * self.window[0]
        return self.out(self.seen)


@pytest.mark.parametrize(
    ("name", "value"),
    [("heads", 4), ("window", (2, 2)), ("scale", 2 * torch.ones(8)), ("mask", torch.zeros(8))],
)
def test_another_attribute_is_another_model(name, value, tmp_path):
    network, data = Net(), [(torch.randn(6), n % 3) for n in range(6)]
    how = {"task": Labelled(F.cross_entropy), "layers": ["fc", "out"]}
    factors = fit(network, data, out=tmp_path / "f", **how)
    queries = prepare_queries(network, factors, data[:2], task=how["task"])
    score(network, queries, data, out=tmp_path / "s", task=how["task"])
    assert network.calls > 0
    setattr(network, name, value)
    for again in (
        lambda: fit(network, data, out=tmp_path / "f", **how),
        lambda: score(network, queries, data, out=tmp_path / "s", task=how["task"]),
    ):
        with pytest.raises((StoreError, ArgumentError), match="model"):
            again()


def test_what_a_pass_writes_is_no_part_of_a_model():
    network = Net()
    before = model_fingerprint(network)
    network(torch.randn(2, 6))
    assert model_fingerprint(network) == before


class Labelled(Plain):
    """A loss of the logits and labels of (input, label)."""

    def __init__(self, loss, reduction="sum"):
        super().__init__()
        self.loss, self.reduction = loss, reduction

    def compute_train_loss(self, batch, model, sample=False):
        reduction = {} if isinstance(self.loss, nn.Module) else {"reduction": self.reduction}
        # Where the weights of a loss are, whatever computes the logits.
        return self.loss(model(batch[0]).cpu(), batch[1].cpu(), **reduction)


def smoothed(smoothing):
    return lambda z, y, reduction: F.cross_entropy(
        z, y, reduction=reduction, label_smoothing=smoothing
    )


@pytest.mark.parametrize(
    "made",
    [
        lambda x: nn.CrossEntropyLoss(reduction="sum", label_smoothing=x),
        lambda x: nn.CrossEntropyLoss(reduction="sum", weight=torch.tensor([1.0, 1.0, 1 + x])),
        lambda x: partial(F.cross_entropy, label_smoothing=x),
        lambda x: partial(F.cross_entropy, weight=torch.tensor([1.0, 1.0, 1 + x])),
        smoothed,
        lambda x: (
            (lambda z, y, reduction: F.cross_entropy(z, y, reduction=reduction) * (1 + 0))
            if x
            else (lambda z, y, reduction: 2 * F.cross_entropy(z, y, reduction=reduction))
        ),
    ],
)
def test_another_loss_is_another_task(made, tmp_path):
    one, same, other = (Labelled(made(x)) for x in (0.0, 0.0, 0.5))
    assert task_state(one) == task_state(same) != task_state(other)
    network, data = Net(), [(torch.randn(6), n % 3) for n in range(6)]
    fit(network, data, out=tmp_path, task=one, layers=["fc", "out"])
    fit(network, data, out=tmp_path, task=same, layers=["fc", "out"])
    with pytest.raises(StoreError, match=r"task_state\.loss"):
        fit(network, data, out=tmp_path, task=other, layers=["fc", "out"])


def test_a_loss_that_is_no_sum_is_refused(tmp_path):
    network, data = Net(), [(torch.randn(6), n % 3) for n in range(6)]
    task = Labelled(F.cross_entropy, "mean")
    with pytest.raises(ArgumentError, match=r"Labelled.* has to be their sum .*batch_size=1"):
        fit(network, data, out=tmp_path, task=task, layers=["fc"])
    fit(network, data, out=tmp_path, task=task, layers=["fc"], batch_size=1)


def test_autocast_outside_is_refused(tmp_path, request):
    with (
        torch.autocast(request.config.getoption("--device"), torch.bfloat16),
        pytest.raises(ArgumentError, match=r"under torch\.autocast, .* give autocast="),
    ):
        fit(gpt2().eval(), corpus(6), out=tmp_path)


def test_pixels_beside_tokens_are_told_where_they_go(tmp_path):
    data = [{"input_ids": [1, 2, 3], "pixel_values": torch.zeros(3, 4, 4)}] * 2
    with pytest.raises(DataError, match=r"pixel_values is torch.float32 \[3, 4, 4\].*'inputs'"):
        fit(gpt2().eval(), data, out=tmp_path)


def test_one_value_of_any_stride(tmp_path):
    one = torch.tensor(7).expand(1)
    assert fingerprint(one) == fingerprint(torch.tensor([7]))
    save_tensors(tmp_path / "x.safetensors", {"x": one})
    assert load_tensors(tmp_path / "x.safetensors")["x"].tolist() == [7]


def test_labels_of_sets_are_compared_by_their_values(tmp_path):
    network, data = gpt2().eval(), corpus(6)
    factors = fit(network, data, out=tmp_path / "f")
    for labels in (torch.tensor([0, 0, 1]), np.array([0, 0, 1]), [0, 0, 1]):
        assert len(prepare_queries(network, factors, asked(3), sets=list(labels))) == 2
    for wrong in ([np.nan, np.nan, 1.0], [[0], [0], [1]], [torch.ones(2)] * 3):
        with pytest.raises(ArgumentError, match=r"sets: the label .* cannot be compared"):
            prepare_queries(network, factors, asked(3), sets=wrong)


def test_a_damping_of_each_layers_own_mean(tmp_path):
    network, data = gpt2(torch.float64).eval(), corpus(6)
    factors = fit(network, data, out=tmp_path / "f")
    default, tenth, less, absolute = (
        prepare_queries(network, factors, asked(1), rank=None, damping=x)
        for x in (None, "0.1x", " 1e-3x", "0.25")
    )
    assert default.damping == tenth.damping
    assert np.allclose(np.array(default.damping), 100 * np.array(less.damping))
    assert {*absolute.damping} == {0.25}
    for own, layer in zip(less.damping, less.layers, strict=True):
        assert own == pytest.approx(1e-3 * float(factors[layer.layer.name].lam.mean()))
    scores = [self_scores(network, factors, data, out=tmp_path / n, damping=x).matrix
              for n, x in (("a", None), ("b", "0.1x"), ("c", "0.01x"))]  # fmt: skip
    assert np.array_equal(scores[0], scores[1])
    assert (scores[2] > scores[1]).all()
    told = r"damping is .*, expected a number >= 0, .*'0.01x'"
    for wrong in ("much", "x", "-1x", "nanx", "infx", "1y", -1, True):
        with pytest.raises(ArgumentError, match=told):
            prepare_queries(network, factors, asked(1), damping=wrong)


def test_a_curvature_below_the_least_damping_is_told(tmp_path):
    network, data = Net().double(), [(torch.randn(6).double(), n % 3) for n in range(6)]
    task = Labelled(lambda z, y, reduction: 1e-9 * F.cross_entropy(z, y, reduction=reduction))
    factors = fit(network, data, out=tmp_path / "f", task=task, layers=["fc", "out"])
    with pytest.warns(Notice, match=r"curvature of fc, out is so small .* 1e-16, and no share"):
        prepare_queries(network, factors, data[:1], task=task)
