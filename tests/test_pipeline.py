"""The whole pipeline against dense EK-FAC, built from per-sample autograd gradients in fp64."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ekfac_fast.candidates import top_candidates
from ekfac_fast.factors import Factors, LayerFactors, eigendecomposition, fit
from ekfac_fast.hooks import select_layers
from ekfac_fast.queries import Queries, prepare_queries
from ekfac_fast.scoring import score, self_scores
from ekfac_fast.store import Store, StoreError
from ekfac_fast.tasks import LanguageModelTask

VOCABULARY, CONTEXT = 61, 24


def gpt2(dtype=torch.float32):
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=VOCABULARY, n_positions=CONTEXT,
        bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        attn_implementation="eager",
    )  # fmt: skip
    return GPT2LMHeadModel(config).to(dtype)


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=40, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=CONTEXT,
        bos_token_id=0, eos_token_id=0, pad_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def corpus(n=12, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"input_ids": rng.integers(0, VOCABULARY, rng.integers(4, 20)).tolist()} for _ in range(n)
    ]


def asked(n=3, seed=1):
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(n):
        ids = rng.integers(0, VOCABULARY, 10).tolist()
        examples.append({"input_ids": ids, "labels": [-100] * 5 + ids[5:]})
    return examples


def batch_of(examples):
    """One example alone, without padding."""
    ids = torch.tensor([examples["input_ids"]])
    labels = torch.tensor([examples.get("labels", examples["input_ids"])])
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": torch.ones_like(ids),
        "index": torch.tensor([examples["id"]]),
    }


def weight_gradient(model, name, loss):
    """[O,J] by autograd on the parameters themselves: no hook of ours."""
    module = model.get_submodule(name)
    parameters = [p for p in (module.weight, module.bias) if p is not None]
    weight, *bias = torch.autograd.grad(loss, parameters, retain_graph=True)
    weight = weight if isinstance(module, nn.Linear) else weight.T
    return torch.cat([weight, *(b.unsqueeze(1) for b in bias)], 1)


def moments(model, names, batch, task):
    """Inputs [T,J] and output gradients [T,O] of one sequence's sampled loss, by plain hooks."""
    seen, handles = {}, []
    for name in names:

        def hook(module, args, output, name=name):
            output.retain_grad()
            seen[name] = (args[0].detach(), output, module.bias is not None)

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    loss = task.compute_train_loss(batch, model, sample=True)
    loss.backward()
    for handle in handles:
        handle.remove()
    rows = {}
    for name, (a, output, bias) in seen.items():
        a = a[0]
        a = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1) if bias else a
        rows[name] = (a, output.grad[0])
    return loss, rows


def dense_ekfac(model, names, data, queries, damping=None):
    """Scores [Q,N], self scores [N] and lam by the definitions, one sequence at a time."""
    model = model.double()
    task = LanguageModelTask()
    data = [example | {"id": i} for i, example in enumerate(data)]
    A, S, lam = ({} for _ in range(3))
    tokens = sum(len(e["input_ids"]) for e in data)
    for example in data:
        _, rows = moments(model, names, batch_of(example), task)
        for name, (a, g) in rows.items():
            A[name] = A.get(name, 0) + a.T @ a / tokens
            S[name] = S.get(name, 0) + g.T @ g / tokens
    Q = {n: (torch.linalg.eigh(A[n])[1], torch.linalg.eigh(S[n])[1]) for n in names}
    for example in data:
        loss = task.compute_train_loss(batch_of(example), model, sample=True)
        for n in names:
            rotated = Q[n][1].T @ weight_gradient(model, n, loss) @ Q[n][0]
            lam[n] = lam.get(n, 0) + rotated**2 / len(data)
    size = {n: 0.1 * lam[n].mean() if damping is None else damping for n in names}

    def inverse(n, G):
        Qa, Qg = Q[n]
        return Qg @ ((Qg.T @ G @ Qa) / (lam[n] + size[n])) @ Qa.T

    def gradients(example, measure):
        loss = measure(batch_of(example), model)
        return {n: weight_gradient(model, n, loss) for n in names}

    train = [gradients(e, task.compute_train_loss) for e in data]
    ask = [gradients(e | {"id": 0}, task.compute_measurement) for e in queries]
    scores = [[sum((inverse(n, q[n]) * g[n]).sum() for n in names) for g in train] for q in ask]
    own = [sum((inverse(n, g[n]) * g[n]).sum() for n in names) for g in train]
    return torch.tensor(scores), torch.tensor(own), lam


def close(got, expected, tolerance):
    got = got if isinstance(got, torch.Tensor) else torch.tensor(np.array(got))
    got, expected = got.double(), expected.double()
    error = (got - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


# Llama's norms compute in fp32 whatever the model is.
@pytest.mark.parametrize(
    ("make", "dtype", "tolerance"),
    [
        (gpt2, torch.float32, 1e-4),
        (llama, torch.float32, 1e-4),
        (gpt2, torch.float64, 1e-9),
        (llama, torch.float64, 1e-6),
    ],
)
def test_scores_are_dense_ekfac(make, dtype, tolerance, tmp_path):
    data, queries = corpus(), asked()
    model = make(dtype)
    names = [layer.name for layer in select_layers(model)]
    expected, own, lam = dense_ekfac(make(), names, data, queries)
    factors = fit(model, data, out=tmp_path / "factors", batch_tokens=64)
    assert [layer.name for layer in factors.layers(model)] == names
    for name in names:
        close(factors[name].lam.sum(), lam[name].sum(), tolerance)
    full = score(
        model, prepare_queries(model, factors, queries, rank=None), data, out=tmp_path / "full",
        per_token=True, batch_tokens=64,
    )  # fmt: skip
    close(full.matrix, expected, tolerance)
    # Rank min(O, J) is exact, through either contraction.
    ranked = prepare_queries(model, factors, queries, rank=16)
    close(score(model, ranked, data, out=tmp_path / "rank").matrix, expected, tolerance)
    close(self_scores(model, factors, data, out=tmp_path / "self").matrix[0], own, tolerance)
    for q in range(len(queries)):
        lowest = full.details(q, lowest=True)
        assert [(d.index, d.score) for d in lowest] == full.top(q, len(lowest), lowest=True) != []
        for detail in [*full.details(q), *lowest]:
            assert detail.score == full.matrix[q, detail.index]
            # The parts may cancel: rounding goes with their size, not with the sum's.
            slack = 1e-6 * np.abs(detail.per_layer_token).sum()
            assert abs(detail.per_token.sum() - detail.score) < slack
            assert abs(detail.per_layer.sum() - detail.score) < slack


def test_absolute_damping(tmp_path):
    data, queries, model = corpus(), asked(), gpt2(torch.float64)
    names = [layer.name for layer in select_layers(model)]
    expected, _, _ = dense_ekfac(gpt2(), names, data, queries, damping=0.3)
    factors = fit(model, data, out=tmp_path / "f")
    prepared = prepare_queries(model, factors, queries, rank=None, damping=0.3)
    close(score(model, prepared, data, out=tmp_path / "s").matrix, expected, 1e-9)


def test_a_smaller_rank_is_close_and_tells_its_energy(tmp_path):
    data, queries, model = corpus(), asked(), gpt2()
    factors = fit(model, data, out=tmp_path / "f")
    full = score(
        model, prepare_queries(model, factors, queries, rank=None), data, out=tmp_path / "s"
    )
    errors = []
    for rank in (2, 6, 12):
        prepared = prepare_queries(model, factors, queries, rank=rank)
        got = score(model, prepared, data, out=tmp_path / f"s{rank}").matrix
        errors.append(np.abs(got - full.matrix).max())
        P = prepare_queries(model, factors, queries, rank=None).layers[0].P
        kept = prepared.preconditioned(prepared.layers[0].layer.name).square().sum((1, 2))
        close(prepared.layers[0].energy, kept / P.square().sum((1, 2)), 1e-3)
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("make", [gpt2, llama])
def test_batches_order_and_padding_do_not_matter(make, tmp_path):
    data, queries, model = corpus(), asked(), make()
    first = fit(model, data, out=tmp_path / "a", batch_tokens=32)
    backwards = [data[i] | {"id": i} for i in reversed(range(len(data)))]
    padded = [
        {
            "input_ids": [0] * 3 + e["input_ids"],
            "attention_mask": [0] * 3 + [1] * len(e["input_ids"]),
            "labels": [-100] * 3 + e["input_ids"],
            "id": e["id"],
        }
        for e in backwards
    ]
    second = fit(model, padded, out=tmp_path / "b", batch_tokens=1000)
    for name in first:
        close(second[name].lam.sum(), first[name].lam.sum(), 1e-5)
    # Eigenvectors are free in sign and within equal eigenvalues; scores are not.
    scores = [
        score(model, prepare_queries(model, f, queries, rank=None), data, out=tmp_path / f"s{i}",
              batch_tokens=tokens).matrix
        for i, (f, tokens) in enumerate(((first, 40), (second, 500)))
    ]  # fmt: skip
    close(scores[1], torch.tensor(np.array(scores[0])), 1e-4)


def test_top_k_is_the_matrix_and_candidates_are_the_only_ones(tmp_path):
    data, queries, model = corpus(30), asked(), gpt2()
    factors = fit(model, data, out=tmp_path / "f")
    prepared = prepare_queries(model, factors, queries, rank=None)
    full = score(model, prepared, data, out=tmp_path / "full", batch_tokens=64)
    heap = score(model, prepared, data, out=tmp_path / "heap", batch_tokens=64, top_k=4)
    assert [heap.top(q, 4) for q in range(3)] == [full.top(q, 4) for q in range(3)]
    with pytest.raises(ValueError, match="top 4"):
        _ = heap.matrix
    some = score(model, prepared, data, out=tmp_path / "some", candidates=[[1, 5], [5], [7, 9, 11]])
    assert (~np.isnan(some.matrix)).sum(1).tolist() == [2, 1, 3]
    close(some.matrix[2, [7, 9, 11]], torch.tensor(np.array(full.matrix[2, [7, 9, 11]])), 1e-5)
    filtered = score(
        model, prepared, data, out=tmp_path / "tfidf", candidates="tfidf:6", per_token=True
    )
    assert (~np.isnan(filtered.matrix)).sum(1).tolist() == [6, 6, 6]
    best = top_candidates([ids for ids, _ in prepared.examples], data, 6, VOCABULARY)[0]
    for q in range(3):
        details = filtered.details(q)
        assert [best[q][d.candidate_rank - 1] for d in details] == [d.index for d in details]


KILLED = """
import os, sys
import ekfac_fast.store as store
sys.path.insert(0, {tests!r})
from test_pipeline import asked, corpus, gpt2
from ekfac_fast.factors import Factors, fit
from ekfac_fast.queries import prepare_queries
from ekfac_fast.scoring import score

def slowly(stage, done, total):
    print(stage, done, flush=True)

store.Pace.due = property(lambda self: True)
model, out = gpt2(), {out!r}
factors = fit(model, corpus(30), out=out + "/f", batch_tokens=32, progress=slowly)
prepared = prepare_queries(model, factors, asked(), rank=4)
score(model, prepared, corpus(30), out=out + "/s", batch_tokens=32, progress=slowly)
score(model, prepared, corpus(30), out=out + "/h", batch_tokens=32, top_k=3, progress=slowly)
"""


def test_killed_and_continued_is_bitwise_the_same(tmp_path):
    """Killed with -9 in every stage, at a line that is printed after a batch, and started again."""
    tests = os.path.dirname(__file__)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(out, kill_after=None):
        code = KILLED.format(tests=tests, out=str(out))
        with subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True,
            env=environment,
        ) as process:  # fmt: skip
            lines = []
            for line in process.stdout:
                lines.append(line)
                if kill_after and len(lines) == kill_after:
                    process.send_signal(signal.SIGKILL)
                    break
        return lines, process.wait()

    lines, status = run(tmp_path / "whole")
    assert status == 0
    third = len(lines) // 4
    for at in (3, third, 2 * third, 3 * third):
        _, status = run(tmp_path / "killed", kill_after=min(at, third))
        assert status == -signal.SIGKILL
    lines, status = run(tmp_path / "killed")
    assert status == 0
    for name in (
        "f/lambda_matrix.safetensors",
        "f/activation_eigenvectors.safetensors",
        "s/scores.npy",
    ):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_other_settings_are_refused_by_name(tmp_path):
    data, model = corpus(), gpt2()
    fit(model, data, out=tmp_path / "f")
    with pytest.raises(StoreError, match="seed"):
        fit(model, data, out=tmp_path / "f", seed=1)
    with pytest.raises(StoreError, match="data"):
        fit(model, data[:-1], out=tmp_path / "f")
    with pytest.raises(StoreError, match="layers"):
        fit(model, data, out=tmp_path / "f", layers="*.c_attn")
    other = gpt2()
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.weight.mul_(1.1)
    with pytest.raises(StoreError, match="model"):
        fit(other, data, out=tmp_path / "f")


def test_bad_input_is_named(tmp_path):
    data, model = corpus(), gpt2()
    with pytest.raises(ValueError, match=r"nearest are .*c_fc"):
        fit(model, data, out=tmp_path / "a", layers="*.c_fcc")
    with pytest.raises(ValueError, match=r"example 0.*outside the vocabulary"):
        fit(model, [{"input_ids": [1, 2, VOCABULARY]}], out=tmp_path / "b")
    with pytest.raises(ValueError, match=r"example 0.*no tokens"):
        fit(model, [{"input_ids": []}], out=tmp_path / "b2")
    with pytest.raises(ValueError, match="empty"):
        fit(model, [], out=tmp_path / "c")
    broken = gpt2()
    with torch.no_grad():
        broken.transformer.h[1].mlp.c_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"loss is nan for examples \["):
        fit(broken, data, out=tmp_path / "d")
    factors = fit(model, data, out=tmp_path / "f")
    wider = GPT2LMHeadModel(GPT2Config(**(model.config.to_diff_dict() | {"n_embd": 32})))
    with pytest.raises(ValueError, match=r"c_fc is .* belong to another model"):
        prepare_queries(wider, factors, asked())
    (tmp_path / "f" / "lambda_matrix.safetensors").write_bytes(b"\x10")
    with pytest.raises(StoreError, match=r"lambda_matrix\.safetensors"):
        _ = Factors(tmp_path / "f")["transformer.h.0.mlp.c_fc"]
    (tmp_path / "f" / "num_lambda_processed.safetensors").unlink()
    with pytest.raises(StoreError, match="num_lambda_processed"):
        Factors(tmp_path / "f")
    with pytest.raises(ValueError, match=r"layer x: lam holds NaN"):
        LayerFactors("x", torch.eye(2), torch.eye(3), torch.full((3, 2), torch.nan))
    with pytest.raises(ValueError, match="covariance of x"):
        eigendecomposition(torch.full((2, 2), torch.inf), "x")


def test_long_sequences_are_cut_and_counted_or_refused(tmp_path):
    data = [*corpus(3), {"input_ids": [1] * (CONTEXT + 5)}]
    model = gpt2()
    factors = fit(model, data, out=tmp_path / "f")
    assert Store.load(tmp_path / "f").state["truncated"] == 1
    queries = prepare_queries(model, factors, asked())
    message = rf"longer than the model's {CONTEXT} positions; the first is example 3 with"
    for refused in (
        lambda: fit(model, data, out=tmp_path / "g", on_long="refuse"),
        lambda: score(model, queries, data, out=tmp_path / "s", on_long="refuse"),
        lambda: self_scores(model, factors, data, out=tmp_path / "i", on_long="refuse"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    assert not any((tmp_path / name).exists() for name in "gsi")


def test_queries_survive_the_disk(tmp_path):
    data, model = corpus(), gpt2()
    factors = fit(model, data, out=tmp_path / "f")
    for rank in (None, 4):
        prepared = prepare_queries(model, factors, asked(), rank=rank)
        prepared.save(tmp_path)
        loaded = Queries.load(tmp_path)
        name = loaded.layers[0].layer.name
        assert torch.equal(loaded.preconditioned(name), prepared.preconditioned(name))
        assert loaded.damping == prepared.damping
        assert torch.equal(loaded.examples[1][1], prepared.examples[1][1])
    with pytest.raises(KeyError, match="mlp"):
        prepared.preconditioned("nowhere")


def test_memory_does_not_grow_with_the_data(tmp_path):
    """Twenty times the sequences: the same peak, in a process of its own."""
    code = """
import re, sys
sys.path.insert(0, {tests!r})
from test_pipeline import asked, corpus, gpt2
from ekfac_fast.factors import fit
from ekfac_fast.queries import prepare_queries
from ekfac_fast.scoring import score
model = gpt2()
few = corpus(20)
factors = fit(model, few, out={out!r} + "/f")
prepared = prepare_queries(model, factors, asked(), rank=4)
class Many:
    def __len__(self): return {n}
    def __getitem__(self, i): return few[i % 20]
score(model, prepared, few, out={out!r} + "/warm", batch_tokens=256, top_k=3)
def peak():
    # Not ru_maxrss: that of a child starts at its parent's size.
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
score(model, prepared, Many(), out={out!r} + "/s", batch_tokens=256, top_k=3)
print(peak() - before)
"""
    grown = {}
    for n in (100, 2000):
        out = tmp_path / str(n)
        out.mkdir()
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c",
             code.format(tests=os.path.dirname(__file__), out=str(out), n=n)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        grown[n] = int(done.stdout)
    assert grown[2000] - grown[100] < 16 * 1024  # KiB


def test_time_is_recorded(tmp_path):
    data, model = corpus(), gpt2()
    factors = fit(model, data, out=tmp_path / "f")
    start = time.perf_counter()
    scores = score(model, prepare_queries(model, factors, asked()), data, out=tmp_path / "s")
    assert 0 < scores.seconds < time.perf_counter() - start


class Regression:
    """kronfluence's method names, tuples through torch's default collate, no attention mask."""

    def compute_train_loss(self, batch, model, sample=False):
        x, y = batch
        return (model(x) - y).square().sum()

    def compute_measurement(self, batch, model):
        x, _ = batch
        return model(x).sum()

    def get_influence_tracked_modules(self):
        return ["0", "2"]

    def get_attention_mask(self, batch):
        return None


def test_a_regression_task_as_written_for_kronfluence(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    data = [(x, x.sum(-1, keepdim=True)) for x in torch.randn(20, 3, dtype=torch.float64)]
    asked, task, names = data[:2], Regression(), ["0", "2"]
    one = [tuple(part[None] for part in example) for example in data]

    def gradients(batch, measure):
        return {n: weight_gradient(model, n, measure(batch, model)) for n in names}

    train = [gradients(batch, task.compute_train_loss) for batch in one]
    expected = torch.zeros(2, 20, dtype=torch.float64)
    for n, source in (("0", lambda x: x), ("2", lambda x: model[1](model[0](x)))):
        inputs = torch.cat([torch.cat([source(x), x.new_ones(1, 1)], 1) for x, _ in one]).detach()
        outputs = torch.cat([g[n][:, -1:].T for g in train])  # the bias's gradient is g itself
        Qa, Qg = (torch.linalg.eigh(x.T @ x / len(one))[1] for x in (inputs, outputs))
        rotated = torch.stack([Qg.T @ g[n] @ Qa for g in train])
        lam = rotated.square().mean(0)
        for q, batch in enumerate(one[:2]):
            P = (Qg.T @ gradients(batch, task.compute_measurement)[n] @ Qa) / (
                lam + 0.1 * lam.mean()
            )
            expected[q] += (P * rotated).sum((1, 2))
    factors = fit(model, data, out=tmp_path / "f", task=task, batch_size=6)
    prepared = prepare_queries(model, factors, asked, task=task, rank=None)
    close(score(model, prepared, data, out=tmp_path / "s", task=task).matrix, expected, 1e-9)
