"""Harness: loops that train on padded batches, and what `score` says of their sequences."""

from contextlib import contextmanager

import torch
from dense_ekfac import asked, corpus
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ekfac_fast import fit, prepare_queries, score

DATA = [example | {"id": i} for i, example in enumerate(corpus(6))]


def batch(examples):
    """Padded on the right, as a collator makes it."""
    ids = [torch.tensor(x["input_ids"]) for x in examples]
    ones = [torch.ones_like(x) for x in ids]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(ids, batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence(ones, batch_first=True),
    }


def count(b):
    return (b["labels"][:, 1:] >= 0).sum()


def mean(model, b):
    """A loop's own mean loss, in the model's dtype."""
    logits = model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), b["labels"][:, 1:].flatten())


def made(model, out):
    """A model, queries prepared on it, and what `score` says of all of the data."""
    factors = fit(model, DATA, out=out / "f")
    queries = prepare_queries(model, factors, asked(2), rank=None)
    found = score(model, queries, DATA, out=out / "s").matrix
    return model, queries, torch.tensor(found)


def hooks(model):
    return [(*m._forward_hooks, *m._forward_pre_hooks) for m in model.modules()]


@contextmanager
def checkpointed(model, kind):
    if kind:
        how = {"use_reentrant": kind == "reentrant"}
        model.train()
        model.enable_input_require_grads()
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    yield
    if kind:
        model.activation_checkpointing_disable()
        model.disable_input_require_grads()
        model.eval()


def body(net, x):
    return net.b(torch.relu(net.a(x)))


def loss_of(net, b):
    return F.cross_entropy(net(b["input_ids"]).logits[:, :-1].mT, b["labels"][:, 1:])
