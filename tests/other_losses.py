"""Harness: EK-FAC of any loss by the definitions, one example at a time and one sequence at a time,
without padding; losses written anew from the model's logits.
"""

import numpy as np
import torch
from dense_ekfac import eigenvectors, weight_gradient
from torch.nn import functional as F

from ekfac_fast.model.sampling import uniforms


def drawn_uniform(at, draw, count, seed=0):
    """What the label of example `at` is drawn by: [count]."""
    mask = torch.ones(1, count)
    return uniforms(seed, torch.tensor([at]), mask, [draw], last=True)[0, 0]


def logits_of(model, ids, **more):
    fields = {name: torch.tensor([x]) for name, x in more.items()}
    return model(input_ids=torch.tensor([ids]), **fields).logits[0]


def log_p(model, ids, labels):
    """log p of the labelled tokens of a sequence."""
    z = logits_of(model, ids).log_softmax(-1)
    return sum(z[t, labels[t + 1]] for t in range(len(ids) - 1) if labels[t + 1] >= 0)


def sides_of(record):
    """(ids, labels) of both sides of a pair."""
    at = record["sides"][0]
    ids, labels = record["input_ids"], record.get("labels", record["input_ids"])
    return (ids[:at], labels[:at]), (ids[at:], labels[at:])


def single(model, record, u=None):
    """-log softmax of the label, or of one that is drawn."""
    z = logits_of(model, record["input_ids"]).log_softmax(-1)
    y = record["label"] if u is None else int((z.exp().cumsum(-1) > u(1)).nonzero()[0])
    return -z[y]


def multi(model, record, u=None):
    z = logits_of(model, record["input_ids"])
    y = torch.tensor(record["label"], dtype=z.dtype)
    if u is not None:
        y = (u(len(z)) < z.sigmoid()).to(z.dtype)
    return -(y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z)).sum()


def regression(model, record, u=None):
    z = logits_of(model, record["input_ids"])
    y = torch.tensor(record["label"], dtype=z.dtype).view(-1)
    if u is not None:
        half = torch.tensor(0.5, dtype=z.dtype)
        y = z.detach() + torch.distributions.Normal(0 * half, half.sqrt()).icdf(u(len(z)))
    return (z - y).square().sum()


def tokens(model, record, u=None):
    z = logits_of(model, record["input_ids"]).log_softmax(-1)
    loss = 0
    uniform = None if u is None else u(len(z))
    for t, y in enumerate(record["labels"]):
        if y == -100:
            continue
        if u is not None:
            y = int((z[t].exp().cumsum(-1) > uniform[t]).nonzero()[0])
        loss = loss - z[t, y]
    return loss


def pair_loss(m, u):
    sign = 1 if u is None or u(1) < m.sigmoid() else -1
    return -F.logsigmoid(sign * m)


def reward(model, record, u=None):
    r = [logits_of(model, ids)[0] for ids, _ in sides_of(record)]
    return pair_loss(r[0] - r[1], u)


def preference(model, record, u=None, beta=0.3):
    chosen, rejected = (log_p(model, *side) for side in sides_of(record))
    m = beta * (chosen - rejected - record["ref_chosen_logps"] + record["ref_rejected_logps"])
    return pair_loss(m, u)


def rows_of(model, names, loss):
    """Inputs [T,J] and output gradients [T,O] of all rows of every layer, by plain hooks."""
    seen, handles = {name: [] for name in names}, []
    for name in names:

        def hook(module, args, output, name=name):
            output.retain_grad()
            seen[name].append((args[0].detach(), output, module.bias is not None))

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    loss().backward()
    for handle in handles:
        handle.remove()
    found = {}
    for name, uses in seen.items():
        a = torch.cat([x.reshape(-1, x.shape[-1]) for x, _, _ in uses])
        g = torch.cat([y.grad.reshape(-1, y.shape[-1]) for _, y, _ in uses])
        found[name] = (torch.cat([a, a.new_ones(len(a), 1)], 1) if uses[0][2] else a, g)
    return found


def by_definition(model, names, data, loss, measures, seed=0):
    """Scores [Q,N], self scores [N], lam: `loss(model, record, u)` of the training data, and of the
    queries what `measures`, functions of a model, give.
    """
    A, S, lam = ({} for _ in range(3))

    def drawing(at, draw):
        return lambda count: drawn_uniform(at, draw, count, seed)

    for at, record in enumerate(data):
        rows = rows_of(model, names, lambda x=record, i=at: loss(model, x, drawing(i, 1)))
        for name, (a, g) in rows.items():
            A[name] = A.get(name, 0) + a.T @ a
            S[name] = S.get(name, 0) + g.T @ g
    Q = {n: (eigenvectors(A[n]), eigenvectors(S[n])) for n in names}

    def gradients(value):
        return {n: weight_gradient(model, n, value) for n in names}

    for at, record in enumerate(data):
        for n, G in gradients(loss(model, record, drawing(at, 0))).items():
            lam[n] = lam.get(n, 0) + (Q[n][1].T @ G @ Q[n][0]) ** 2 / len(data)

    def inverse(n, G):
        Qa, Qg = Q[n]
        damping = (0.1 * lam[n].mean()).clamp(min=1e-8)
        return Qg @ ((Qg.T @ G @ Qa) / (lam[n] + damping)) @ Qa.T

    train = [gradients(loss(model, record)) for record in data]
    ask = [gradients(measure(model)) for measure in measures]
    scores = [[sum((inverse(n, q[n]) * g[n]).sum() for n in names) for g in train] for q in ask]
    own = [sum((inverse(n, g[n]) * g[n]).sum() for n in names) for g in train]
    return torch.tensor(scores), torch.tensor(own), lam


def texts(n, vocabulary, seed=0, shortest=4, longest=14):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocabulary, rng.integers(shortest, longest)).tolist() for _ in range(n)]


def pairs(n, vocabulary, seed=0, prompt=2):
    """Pairs with a common prompt, and log-probabilities of a reference that is nobody's."""
    rng, every = np.random.default_rng(seed), texts(2 * n, vocabulary, seed)
    found = []
    for a, b in zip(every[::2], every[1::2], strict=True):
        b = a[:prompt] + b[prompt:]
        labels = [-100] * prompt + a[prompt:] + [-100] * prompt + b[prompt:]
        ref = rng.normal(-30, 3, 2)
        found.append(
            {
                "input_ids": a + b,
                "labels": labels,
                "sides": [len(a), len(b)],
                "ref_chosen_logps": float(ref[0]),
                "ref_rejected_logps": float(ref[1]),
            }
        )
    return found
