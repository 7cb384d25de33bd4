"""Models by a device map: modules whose weights wait in memory or files until they run, tied ones
among them; what cannot be answered of them is refused. Two devices: `test_residency_cases.py`.
"""

import gc

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from dense_ekfac import asked, corpus, gpt2, llama
from test_experts import MIXTRAL
from test_model_families import made
from torch import nn

from ekfac_fast import fit, prepare_queries, score, self_scores
from ekfac_fast.errors import ArgumentError, ModelError, Notice
from ekfac_fast.model.identity import model_fingerprint
from ekfac_fast.model.layers import select_layers
from ekfac_fast.model.spread import device_of, is_spread, let_go, offloaded
from ekfac_fast.model.weights import check_weights, resident_bytes
from ekfac_fast.stages.attribution import unattributable
from ekfac_fast.stages.run import Run
from ekfac_fast.validation import tail_patch
from ekfac_fast.validation.baselines import representation
from ekfac_fast.validation.measure import measurements
from ekfac_fast.validation.one_step import step_check
from ekfac_fast.validation.pbrf import responses

CPU = torch.device("cpu")
# The embedding of GPT-2 is its head's weight too, here in two places.
MAPS = {
    gpt2: {
        "transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.drop": "cpu",
        "transformer.h.0": "disk", "transformer.h.1": "disk", "transformer.ln_f": "disk",
        "lm_head": "disk",
    },
    llama: {
        "model.embed_tokens": "disk", "model.layers.0": "disk", "model.layers.1": "cpu",
        "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk",
    },
}  # fmt: skip


def divided(make, folder, dtype=torch.float32):
    return dispatch_model(
        make(dtype).eval(), MAPS[make], main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


def job(model, out):
    how = {"batch_tokens": 40}
    factors = fit(model, corpus(6), out=out / "f", **how)
    queries = prepare_queries(model, factors, asked(), rank=4)
    scores = score(model, queries, corpus(6), out=out / "s", per_token=True, **how)
    return factors, scores, self_scores(model, factors, corpus(6), out=out / "own", **how)


@pytest.mark.parametrize("make", MAPS)
def test_every_stage_of_an_offloaded_model(make, tmp_path):
    whole, model = make(torch.float64).eval(), divided(make, tmp_path / "weights", torch.float64)
    assert offloaded(model)
    assert resident_bytes(model) < resident_bytes(whole) / 2
    assert model_fingerprint(model) == model_fingerprint(whole)
    factors, *expected = job(whole, tmp_path / "whole")
    mine, *found = job(model, tmp_path / "divided")
    assert mine.identity == factors.identity
    for name in factors:
        error = (mine[name].lam - factors[name].lam).abs().max()
        assert error <= 1e-12 * factors[name].lam.max()
    for one, other in zip(found, expected, strict=True):
        one, other = np.array(one.matrix), np.array(other.matrix)
        assert np.abs(one - other).max() <= 1e-12 * np.abs(other).max()
    for a, b in zip(found[0].details(0), expected[0].details(0), strict=True):
        np.testing.assert_allclose(a.per_layer_token, b.per_layer_token, rtol=1e-9)
    # As it was: every weight away again, every one to be trained.
    assert all(p.requires_grad for p in model.parameters())
    assert {n for n, p in model.named_parameters() if p.is_meta} <= {*offloaded(model)}


def test_another_weight_in_a_file_is_another_model(tmp_path):
    model = divided(llama, tmp_path)
    file = tmp_path / "model.layers.0.mlp.up_proj.weight.dat"
    before = model_fingerprint(model)
    values = np.memmap(file, dtype=np.float32, mode="r+")
    values[7] += 1
    values.flush()
    assert model_fingerprint(model) != before


def test_what_a_backward_pass_needs_comes_again(tmp_path):
    """Not one weight of an offloaded model is held from its forward pass to its backward pass."""

    class Weights(dict):
        """Where they wait: each time a tensor of its own, as of another device."""

        def __getitem__(self, name):
            came.append(name)
            return super().__getitem__(name).clone()

    torch.manual_seed(0)
    whole = nn.Sequential(*(nn.Linear(48, 48) for _ in range(4))).requires_grad_(False)
    x = torch.randn(5, 48, requires_grad=True)
    (expected,) = torch.autograd.grad(whole(x).square().sum(), x)
    model = cpu_offload(whole, execution_device=CPU)
    came: list[str] = []
    for module in model:
        hook = module._hf_hook
        hook.weights_map = Weights({n: hook.weights_map[n] for n in ("weight", "bias")})
    with let_go(model):
        loss = model(x).square().sum()
        assert came == ["weight", "bias"] * 4
        gc.collect()
        held = [
            y for y in gc.get_objects()
            if issubclass(type(y), torch.Tensor) and y.shape == (48, 48) and not y.is_meta
        ]  # fmt: skip
        assert len(held) == 4  # where they wait
        for again in range(2):
            (found,) = torch.autograd.grad(loss, x, retain_graph=not again)
            assert torch.equal(found, expected)
    assert came[8:] == ["weight"] * 8


def test_tied_weights_are_one_parameter_in_two_places(tmp_path):
    model = divided(gpt2, tmp_path)
    model(torch.tensor([[1, 2]]))  # from then on two tensors
    assert len([*model.parameters()]) == len([*gpt2().parameters()]) + 1
    with pytest.raises(ArgumentError, match=r"lm_head shares a parameter with transformer\.wte"):
        select_layers(model, ["lm_head"])
    with pytest.warns(Notice, match=r"lm_head has the parameters of transformer\.wte"):
        assert [x.name for x in select_layers(model, "all")] == [
            x.name for x in select_layers(gpt2(), "all")
        ]


def test_what_is_refused(tmp_path):
    model = divided(llama, tmp_path)
    factors = fit(model, corpus(4), out=tmp_path / "f")
    with pytest.raises(ModelError, match="spread by a device_map"):
        prepare_queries(model, factors, asked(1), refine="cg:2", dataset=corpus(4))
    queries = prepare_queries(model, factors, asked(1))
    found = score(model, queries, corpus(4), out=tmp_path / "s", per_token=True, attribution=True)
    assert "spread by a device_map" in found.unattributed
    experts = cpu_offload(made("Mixtral", **MIXTRAL), execution_device=CPU)
    with pytest.raises(ModelError, match=r"experts .*are offloaded"):
        fit(experts, corpus(4), out=tmp_path / "experts")
    fit(experts, corpus(4), out=tmp_path / "attention", layers="*q_proj")
    with pytest.raises(ArgumentError, match=r"weight .*embed_tokens.weight is on the meta device"):
        check_weights(llama().to("meta"))


def test_weights_that_come_for_a_pass_are_measured_and_not_moved(tmp_path):
    model, data = divided(llama, tmp_path / "w"), corpus(4)
    factors = fit(model, data, out=tmp_path / "f")
    queries = prepare_queries(model, factors, asked())
    scores = score(model, queries, data, out=tmp_path / "s")
    torch.testing.assert_close(measurements(model, asked()), measurements(llama().eval(), asked()))
    assert representation(model, asked(), data).shape == (len(asked()), 4)
    with (
        pytest.raises(ArgumentError, match=r"apply changes weights .* are offloaded"),
        queries.apply(model, -1e-3),
    ):
        pass
    with pytest.raises(ArgumentError, match=r"a step changes weights .* are offloaded"):
        step_check(model, queries, scores, data)
    with pytest.raises(ArgumentError, match=r"a step changes weights .* are offloaded"):
        tail_patch(model, asked(), data, {"ours": scores}, k=1)
    with pytest.raises(ArgumentError, match=r"a response changes weights .* are offloaded"):
        responses(model, asked(), data, [0], damping=0.1)


def test_where_a_module_computes(tmp_path):
    model = divided(llama, tmp_path)
    assert device_of(model) == device_of(model, "model.layers.0.mlp") == CPU
    meta = cpu_offload(nn.Sequential(nn.Linear(3, 3)), execution_device=CPU)
    meta[0]._hf_hook.execution_device = "cuda:1"
    assert device_of(meta, "0") == torch.device("cuda", 1)


def test_tensor_parallel_models_are_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = llama()
    model._tp_size = 2  # as transformers' tp_plan leaves it
    with pytest.raises(ArgumentError, match=r"lies in 2 processes: a tensor-parallel model"):
        fit(model, corpus(4), out=tmp_path / "f")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        mesh = init_device_mesh("cpu", (1,))
        split = parallelize_module(llama(), mesh, {"model.layers.1.mlp.up_proj": ColwiseParallel()})
        message = r"model\.layers\.1\.mlp\.up_proj\.weight lies in several .* tensor-parallel"
        with pytest.raises(ArgumentError, match=message):
            fit(split, corpus(4), out=tmp_path / "f")
    finally:
        dist.destroy_process_group()
    assert not (tmp_path / "f").exists()


def test_what_lies_apart_without_a_map_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(torch.zeros(3, 3, device="meta"))
    with pytest.raises(ArgumentError, match=r"weight 1\.weight is on the meta device"):
        check_weights(model)


def test_one_device_is_no_spread():
    """`device_map="cuda"`, or "auto" where there is one: everything works as without."""
    model = dispatch_model(llama(), {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert not is_spread(model)
    assert unattributable(Run(model, corpus(2), {}), select_layers(model)) is None


def test_the_command(tmp_path):
    import json

    from test_blocks import demo_files
    from typer.testing import CliRunner

    from ekfac_fast.cli import app
    from ekfac_fast.cli import demo_small as demo

    demo_files(demo, tmp_path)
    model, data, out = (str(tmp_path / x) for x in ("model", "corpus", "f"))

    def run(*words, code=0):
        done = CliRunner().invoke(app, ["fit", model, data, "--out", out, *words])
        assert done.exit_code == code, done.output
        return " ".join(done.output.split())

    run("--device-map", "auto", "--max-examples", "8")
    assert json.loads((tmp_path / "f" / "manifest.json").read_text())["finished"]
    assert "leave --shard out" in run("--device-map", "auto", "--shard", code=1)
    assert "cannot be loaded" in run("--device-map", "nowhere", code=1)
