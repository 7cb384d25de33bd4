"""Classification, regression, tokens and pairs against per-sample autograd of the whole chain."""

from functools import partial

import numpy as np
import other_losses as truth
import pytest
import torch
import transformers as T
from dense_ekfac import VOCABULARY, close, gpt2

from ekfac_fast import (
    LanguageModelTask,
    PreferenceTask,
    RewardTask,
    SequenceClassificationTask,
    TokenClassificationTask,
    fit,
    prepare_queries,
    score,
    self_scores,
)
from ekfac_fast.data.batches import Batches
from ekfac_fast.errors import ArgumentError, DataError, ModelError
from ekfac_fast.model.classification import log_odds
from ekfac_fast.model.layers import select_layers
from ekfac_fast.model.text_tasks import form_of

N = 14


def bert(kind=T.BertForSequenceClassification, **more):
    torch.manual_seed(0)
    config = T.BertConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=10, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32, attn_implementation="eager", **more,
    )  # fmt: skip
    return livelier(kind(config))


def decoder(kind=T.GPT2ForSequenceClassification, **more):
    """The last token that is no padding is read."""
    torch.manual_seed(0)
    config = T.GPT2Config(
        n_layer=1, n_embd=8, n_inner=10, n_head=2, vocab_size=VOCABULARY, n_positions=32,
        attn_implementation="eager", **{"pad_token_id": 2, "num_labels": 1} | more,
    )  # fmt: skip
    return livelier(kind(config))


def livelier(model):
    """Outputs that are not all alike, with random weights."""
    for p in model.parameters():
        p.data.normal_(0, 0.4)
    return model.double().eval()


def labelled(labels, seed=0):
    ids = truth.texts(len(labels), VOCABULARY, seed)
    return [{"input_ids": x, "label": y} for x, y in zip(ids, labels, strict=True)]


def tagged(n, K, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for ids in truth.texts(n, VOCABULARY, seed):
        labels = rng.integers(0, K, len(ids))
        labels[[0, len(ids) // 2]] = -100
        found.append({"input_ids": ids, "labels": labels.tolist()})
    return found


rng = np.random.default_rng(1)
# All but a head that is tied to the embedding.
LAYERS = {"Bert": "all", "GPT2": ["*.c_attn", "*.c_fc", "*.c_proj"]}
CASES = {
    "single label, a pooler": (
        lambda: bert(num_labels=3), SequenceClassificationTask, truth.single,
        labelled(rng.integers(0, 3, N).tolist()),
    ),
    "single label, the last token": (
        lambda: decoder(num_labels=3), SequenceClassificationTask, truth.single,
        labelled(rng.integers(0, 3, N).tolist()),
    ),
    "several labels": (
        lambda: bert(num_labels=3, problem_type="multi_label_classification"),
        SequenceClassificationTask, truth.multi, labelled(rng.integers(0, 2, (N, 3)).tolist()),
    ),
    "regression": (
        lambda: decoder(num_labels=2, problem_type="regression"), SequenceClassificationTask,
        truth.regression, labelled(rng.normal(size=(N, 2)).tolist()),
    ),
    "tokens": (
        lambda: bert(T.BertForTokenClassification, num_labels=4), TokenClassificationTask,
        truth.tokens, tagged(N, 4),
    ),
    "a reward model": (
        lambda: decoder(num_labels=1), RewardTask, truth.reward, truth.pairs(N, VOCABULARY),
    ),
    "a reward model, a pooler": (
        lambda: bert(num_labels=1), RewardTask, truth.reward, truth.pairs(N, VOCABULARY),
    ),
    "preferences": (
        lambda: decoder(T.GPT2LMHeadModel), partial(PreferenceTask, 0.3), truth.preference,
        truth.pairs(N, VOCABULARY),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_whole_chain_is_per_sample_autograds(case, tmp_path):
    make, task_of, loss, data = case
    model, task = make(), task_of()
    names = [x.name for x in select_layers(model, LAYERS[type(model).__name__[:4]])]
    measures = [partial(loss, record=record) for record in data[:2]]
    expected, own, lam = truth.by_definition(model, names, data, loss, measures)
    factors = fit(model, data, out=tmp_path / "f", task=task, layers=names, batch_tokens=90)
    for name in names:
        close(factors[name].lam.sum(), lam[name].sum(), 1e-10)
    queries = prepare_queries(model, factors, data[:2], rank=None, task=task)
    with torch.no_grad():
        close(queries.measurements, torch.stack([m(model) for m in measures]), 1e-6)
    found = score(
        model, queries, data, out=tmp_path / "s", task=task, batch_tokens=64, per_token=True,
        attribution=True,
    )  # fmt: skip
    close(found.matrix, expected, 1e-10)
    alone = self_scores(model, factors, data, out=tmp_path / "self", task=task, batch_tokens=1)
    close(alone.matrix[0], own, 1e-10)
    # Tokens of an example, of a pair both sides', have its score; losses of single tokens are no
    # part of such a loss, and the reason is said.
    for detail in found.details(0):
        assert len(detail.per_token) == len(data[detail.index]["input_ids"])
        assert detail.target is None
        slack = 1e-10 * np.abs(detail.per_layer_token).sum()
        assert abs(detail.per_token.sum() - detail.score) < slack
    assert f"{type(task).__name__} has a loss of its own" in found.unattributed
    # The filter by words reads both sides of a pair.
    some = score(model, queries, data, out=tmp_path / "w", task=task, candidates="tfidf:3")
    assert (~np.isnan(some.matrix)).sum(1).tolist() == [3, 3]


@pytest.mark.parametrize("name", ["single label, a pooler", "tokens", "preferences"])
def test_refinement_knows_the_loss(name, tmp_path):
    """Steps come to the equation's solution: of a tiny model's one matrix, with much damping."""
    make, task_of, _, data = CASES[name]
    model, task = make(), task_of()
    name = select_layers(model, None)[0].name
    factors = fit(model, data, out=tmp_path / "f", task=task, layers=[name])
    refined = prepare_queries(
        model, factors, data[:1], rank=None, task=task, damping=1.0, refine="cg:30", dataset=data
    )
    assert refined.residual.max() < 1e-3


def test_margins_are_log_odds():
    p = torch.tensor([[0.2, 0.6, 0.2], [0.2, 0.5, 0.3]], dtype=torch.float64)
    y = torch.tensor([1, 0])
    close(log_odds(p.log() + 5, y), torch.tensor([1.5, 0.25], dtype=p.dtype).log(), 1e-12)


def test_a_margin_is_measured(tmp_path):
    model = bert(num_labels=3)
    data = labelled([0, 1, 2, 1, 0])
    task = SequenceClassificationTask("margin")
    factors = fit(model, data, out=tmp_path / "f", task=task)
    queries = prepare_queries(model, factors, data[:3], task=task)
    with torch.no_grad():
        p = torch.stack([(-truth.single(model, x)).exp() for x in data[:3]])
    close(queries.measurements, -(p / (1 - p)).log(), 1e-6)
    many = bert(num_labels=2, problem_type="multi_label_classification")
    batches = Batches([{"input_ids": [3, 4], "label": [1, 0]}], many, form=form_of(task, many))
    batch = batches.load([0])
    z = task.compute_outputs(batch, many)
    close(task.measurements(batch, many), z[:, 1] - z[:, 0], 1e-12)
    pair = truth.pairs(1, VOCABULARY)
    one = PreferenceTask(0.3, "margin")
    batch = Batches(pair, gpt2(), form=form_of(one, gpt2())).load([0])
    close(one.measurements(batch, gpt2()), -one.compute_outputs(batch, gpt2()), 1e-12)
    with pytest.raises(ArgumentError, match="a regression has none"):
        fit(bert(num_labels=1), labelled([0.5]), out=tmp_path / "r", task=task)


DRAWS = 3000


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_labels_are_drawn_as_the_model_would(case):
    """Gradients of drawn losses are zero in the mean, and their square is the Hessian's."""
    make, task_of, _, data = case
    model, task = make(), task_of()
    batches = Batches(data, model, form=form_of(task, model))
    batch = batches.load([3])
    with torch.no_grad():
        z = task.compute_outputs(batch, model)
    many = {name: x.repeat(DRAWS, *[1] * (x.ndim - 1)) for name, x in batch.items()}
    many |= {"index": torch.arange(DRAWS), "draw": 2}
    every = z.repeat(DRAWS, *[1] * (z.ndim - 1)).requires_grad_(True)
    loss = task.losses(every, task.drawn(every.detach(), many)).sum()
    g = torch.autograd.grad(loss, every)[0].view(DRAWS, -1)
    hessian = torch.autograd.functional.hessian(
        lambda x: task.compute_output_loss(x, batch), z.detach()
    ).view(g.shape[1], g.shape[1])
    scale = hessian.diagonal().max()
    assert (g.mean(0).abs() / scale.sqrt()).max() < 5 / len(g) ** 0.5
    assert ((g.T @ g / len(g) - hessian).abs() / scale).max() < 8 / len(g) ** 0.5


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_batches_and_order_do_not_matter(case):
    """Padded batches draw the labels that single examples do, and have their losses."""
    make, task_of, _, data = case
    model, task = make(), task_of()
    form = form_of(task, model)
    data = [x | {"id": i} for i, x in enumerate(data)]
    together = Batches(data[::-1], model, form=form).load(range(N)) | {"draw": 1}
    with torch.no_grad():
        z = task.compute_outputs(together, model)
        every = task.losses(z, task.drawn(z, together)).flip(0)
        for index in range(0, N, 3):
            one = Batches(data, model, form=form).load([index]) | {"draw": 1}
            z = task.compute_outputs(one, model)
            close(task.losses(z, task.drawn(z, one)), every[index : index + 1], 1e-9)


ONE_NUMBER = (
    lambda: bert(num_labels=1), SequenceClassificationTask, None,
    labelled(np.linspace(-1, 1, N).tolist()),
)  # fmt: skip


@pytest.mark.parametrize(
    "case", [*CASES.values(), ONE_NUMBER], ids=[*CASES, "a regression of one number"]
)
def test_data_is_known_again_by_a_table(case, tmp_path):
    """Whatever a task reads of it; and factors by their model, which a pass with labels changes."""
    make, task_of, _, data = case
    data = [x | {"source": f"file {n}"} for n, x in enumerate(data)]
    model, task = make().eval(), task_of()
    arguments = {"task": task, "layers": LAYERS.get(type(model).__name__[:4], "all")}
    factors = fit(model, data, out=tmp_path / "f", **arguments)
    if isinstance(task, SequenceClassificationTask):
        batch = Batches(data, model, form=form_of(task, model)).load([0])
        model(input_ids=batch["input_ids"], labels=batch["label"])
    queries = prepare_queries(model, factors, data[:2], task=task)
    scores = score(model, queries, data, out=tmp_path / "s", task=task)
    found = scores.to_arrow(data, columns=["source"])["source"].to_pylist()
    assert found == [x["source"] for x in data]
    other = [data[1], data[0], *data[2:]]
    with pytest.raises(ArgumentError, match="data has other sequences than were scored"):
        scores.to_arrow(other, columns=["source"])


def test_names_of_transformers_data_sets_are_known(tmp_path):
    model, task = bert(num_labels=3), SequenceClassificationTask()
    data = labelled([0, 2, 1])
    theirs = [{"input_ids": x["input_ids"], "labels": torch.tensor(x["label"])} for x in data]
    loads = [Batches(x, model, form=form_of(task, model)).load([0, 1, 2]) for x in (data, theirs)]
    assert torch.equal(loads[0]["label"], loads[1]["label"])
    assert loads[0]["label"].dtype == torch.int64


WRONG = {
    "label is 3, but the model knows 0 to 2": ({"label": 3}, {}),
    r"label is 'pos', expected one of the model's 3 classes": ({"label": "pos"}, {}),
    r"label is \[0, 1, 0\].*problem_type=\"multi_label_classification\"": (
        {"label": [0, 1, 0]}, {},
    ),
    "has no 'label'; it has 'input_ids'": ({}, {}),
    r"label is \[0, 1\], expected 3 values, 0 or 1 of every class": (
        {"label": [0, 1]}, {"problem_type": "multi_label_classification"},
    ),
    r"label is \[0, 2, 1\], expected 0 or 1": (
        {"label": [0, 2, 1]}, {"problem_type": "multi_label_classification"},
    ),
    "label is nan, expected 3 values, finite numbers": (
        {"label": float("nan")}, {"problem_type": "regression"},
    ),
    "is a pair, expected one sequence": ({"label": 1, "sides": [1, 2]}, {}),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_labels_that_a_model_does_not_know(message, tmp_path):
    wrong, more = WRONG[message]
    right = {"problem_type": "x"} | more
    good = {"x": 1, "multi_label_classification": [1, 0, 1], "regression": [1.0, 2, 3]}
    first = {"input_ids": [3, 4, 5], "label": good[right["problem_type"]]}
    data = [first, {"input_ids": [3, 4, 5], **wrong}]
    with pytest.raises(DataError, match=f"example 1: {message}"):
        fit(bert(num_labels=3, **more), data, out=tmp_path, task=SequenceClassificationTask())


def test_data_and_models_that_do_not_fit(tmp_path):
    tags, pairs = tagged(2, 4), truth.pairs(2, VOCABULARY)
    tags[1]["labels"][1] = 4
    tokens = bert(T.BertForTokenClassification, num_labels=4)
    told = "example 1: label 4 at position 1, but the model knows 0 to 3"
    with pytest.raises(DataError, match=told):
        fit(tokens, tags, out=tmp_path, task=TokenClassificationTask())
    with pytest.raises(ModelError, match=r"TokenClassificationTask does not fit a Bert"):
        fit(bert(num_labels=4), tagged(3, 4), out=tmp_path, task=TokenClassificationTask())
    with pytest.raises(ArgumentError, match="2 outputs; a reward is one"):
        fit(bert(num_labels=2), pairs, out=tmp_path, task=RewardTask())
    with pytest.raises(ArgumentError, match=r"without config\.num_labels"):
        fit(torch.nn.Linear(2, 2), pairs, out=tmp_path, task=RewardTask(), layers="all")
    with pytest.raises(DataError, match="example 0: is 1 sequence, expected a pair"):
        fit(gpt2(), [{"input_ids": [1, 2]}], out=tmp_path, task=PreferenceTask())
    lacking = [{k: x for k, x in p.items() if k != "ref_chosen_logps"} for p in pairs]
    with pytest.raises(DataError, match="example 0: has no 'ref_chosen_logps'"):
        fit(gpt2(), lacking, out=tmp_path, task=PreferenceTask())
    same = [pairs[0], pairs[1] | {"input_ids": [4, 5, 4, 5], "sides": [2, 2], "labels": [4] * 4}]
    with pytest.raises(DataError, match="example 1: both sides are the same 2 tokens"):
        fit(gpt2(), same, out=tmp_path, task=PreferenceTask())
    with pytest.raises(DataError, match="example 0: is a pair, expected one sequence"):
        fit(gpt2(), pairs, out=tmp_path)
    unpadded = decoder(num_labels=3, pad_token_id=None)
    data = labelled([0, 1, 2, 1])
    with pytest.raises(ModelError, match=r"set config\.pad_token_id, or give batch_tokens=1"):
        fit(unpadded, data, out=tmp_path / "u", task=SequenceClassificationTask())
    fit(unpadded, data, out=tmp_path / "v", task=SequenceClassificationTask(), batch_tokens=1)


def test_a_model_that_padding_changes_is_refused(tmp_path):
    class Last(T.BertForSequenceClassification):
        """Reads the last position, whatever stands there."""

        def forward(self, input_ids=None, attention_mask=None, **more):
            h = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return T.modeling_outputs.SequenceClassifierOutput(logits=self.classifier(h[:, -1]))

    data, task = labelled([0, 1, 2, 1]), SequenceClassificationTask()
    with pytest.raises(ModelError, match="padding behind a sequence changes"):
        fit(bert(Last, num_labels=3), data, out=tmp_path / "p", task=task)
    fit(bert(Last, num_labels=3), data, out=tmp_path / "a", task=task, batch_tokens=1)


def test_other_questions_to_a_model_of_preferences(tmp_path):
    """A completion, where the training data are pairs."""
    model, data = decoder(T.GPT2LMHeadModel), truth.pairs(N, VOCABULARY)
    names = [x.name for x in select_layers(model)]  # MLPs
    ids = truth.texts(1, VOCABULARY, 9)[0]
    query = {"input_ids": ids, "labels": [-100, *ids[1:]]}
    expected, _, _ = truth.by_definition(
        model, names, data, truth.preference, [lambda m: -truth.log_p(m, ids, query["labels"])]
    )
    task = PreferenceTask(0.3)
    factors = fit(model, data, out=tmp_path / "f", task=task)
    queries = prepare_queries(model, factors, [query], rank=None, task=LanguageModelTask())
    close(score(model, queries, data, out=tmp_path / "s", task=task).matrix, expected, 1e-10)
