"""The callback of Hugging Face's Trainer: scores of every step, the same training."""

from types import SimpleNamespace

import pytest
import torch
from dense_ekfac import asked, close, corpus, gpt2
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

from ekfac_fast import CaptureCallback, fit, prepare_queries, score
from ekfac_fast.errors import ArgumentError, ModelError
from ekfac_fast.store.fingerprint import fingerprint

DATA = [{"input_ids": x["input_ids"], "id": i} for i, x in enumerate(corpus(8))]


def collate(examples):
    ids = [torch.tensor(x["input_ids"]) for x in examples]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(ids, batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
    }


def trained(folder, callbacks, **more):
    """A model after two steps of two batches of two sequences."""
    how = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2,
        "learning_rate": 1e-2, "use_cpu": True, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, "logging_strategy": "no", "remove_unused_columns": False,
    }  # fmt: skip
    model = gpt2()
    trainer = Trainer(
        model, TrainingArguments(str(folder), **how | more), train_dataset=DATA,
        data_collator=collate, callbacks=callbacks,
    )  # fmt: skip
    trainer.train()
    return model


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    out, model = tmp_path_factory.mktemp("trainer"), gpt2()
    queries = prepare_queries(model, fit(model, DATA, out=out / "f"), asked(2), rank=None)
    return queries, torch.tensor(score(model, queries, DATA, out=out / "s").matrix)


@pytest.mark.parametrize(
    "more", [{}, {"activation_checkpointing": True}], ids=["plain", "checkpoint"]
)
def test_scores_of_every_step_and_the_same_weights(prepared, tmp_path, more):
    queries, expected = prepared
    callback = CaptureCallback(queries=queries, covariances=True)
    model, without = trained(tmp_path, [callback], **more), trained(tmp_path, [], **more)
    for (name, p), q in zip(model.named_parameters(), without.parameters(), strict=True):
        assert torch.equal(p, q), name
    hooks = [[len(m._forward_hooks) for m in x.modules()] for x in (model, without)]
    assert hooks[0] == hooks[1]
    assert [(x.number, len(x.batches)) for x in callback.steps] == [(1, 2), (2, 2)]
    place = {fingerprint(torch.tensor(x["input_ids"])): i for i, x in enumerate(DATA)}
    columns = [place[name] for x in callback.steps for seen in x.batches for name in seen.sequences]
    assert sorted(columns) == [*range(8)]
    # The first step is that of the weights which the queries are of.
    found = torch.cat([seen.scores for seen in callback.steps[0].batches], 1)
    close(found, expected[:, columns[:4]], 1e-5)
    later = torch.cat([seen.scores for seen in callback.steps[1].batches], 1)
    assert (later - expected[:, columns[4:]]).abs().max() > 1e-3 * expected.abs().max()
    tokens = sum(len(x["input_ids"]) for x in DATA)
    assert {x.gradient_tokens for x in callback.covariances.values()} == {tokens}


def test_steps_are_given_to_a_function(prepared, tmp_path):
    seen = []
    callback = CaptureCallback(queries=prepared[0], on_step=seen.append)
    trained(tmp_path, [callback])
    assert [x.number for x in seen] == [1, 2]
    assert callback.steps == []
    assert callback.covariances is None


def test_what_cannot_be_right_is_refused(prepared, tmp_path):
    callback = CaptureCallback(queries=prepared[0])
    with pytest.raises(ModelError, match="has no loss of its labels in this loop: say by `scale`"):
        trained(tmp_path, [callback], label_smoothing_factor=0.1)
    callback.close()
    with pytest.raises(ArgumentError, match="torch_compile"):
        callback.on_train_begin(SimpleNamespace(torch_compile=True), None, None, model=None)
    devices = SimpleNamespace(torch_compile=False, n_gpu=2)
    with pytest.raises(ArgumentError, match="2 devices"):
        callback.on_train_begin(devices, None, None, model=None)
    with pytest.raises(ArgumentError, match="give queries, too"):
        CaptureCallback(on_step=print)
