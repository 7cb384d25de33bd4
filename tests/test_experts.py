"""Routed experts: each matrix of [E,O,I] is a layer, exact against its slice of the gradient."""

from dataclasses import replace

import pytest
import torch
from dense_ekfac import asked, close, corpus
from test_model_families import check, made

from ekfac_fast import fit, prepare_queries, score
from ekfac_fast.errors import ArgumentError, ModelError, Notice
from ekfac_fast.model.experts import Places, Routing
from ekfac_fast.model.layers import select_layers
from ekfac_fast.stages.plan import plan
from ekfac_fast.stages.run import Stage
from ekfac_fast.store.files import load_tensors
from ekfac_fast.validation.ablations import kfac_factors
from ekfac_fast.validation.one_step import step_check

FEW = {"num_key_value_heads": 2, "num_experts_per_tok": 2}
MIXTRAL = FEW | {"num_local_experts": 4}
QWEN = FEW | {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12}
DEEPSEEK = FEW | {
    "n_routed_experts": 4, "moe_intermediate_size": 8, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
NEMOTRON = FEW | {
    "layers_block_type": ["attention", "moe"], "n_routed_experts": 4, "moe_intermediate_size": 8,
    "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 12, "n_group": 1,
    "topk_group": 1, "head_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "more", "count"),
    [
        pytest.param("Mixtral", MIXTRAL, 16, id="Mixtral"),
        pytest.param("Qwen2Moe", QWEN, 22, id="with shared experts"),
        pytest.param("GptOss", MIXTRAL | {"head_dim": 8}, 16, id="transposed, biases"),
        pytest.param("DeepseekV3", DEEPSEEK, 3 + 3 + 8, id="a dense block first"),
        pytest.param("NemotronH", NEMOTRON, 2 + 8, id="no gate"),
        pytest.param("Olmoe", FEW | {"num_experts": 4}, 16, id="OLMoE"),
        pytest.param("GraniteMoe", MIXTRAL, 16, id="Granite"),
        pytest.param("Phimoe", MIXTRAL, 16, id="Phi"),
        pytest.param(
            "Llama4", MIXTRAL | {"intermediate_size_mlp": 24, "interleave_moe_layer_step": 2},
            3 + 3 + 8, id="tokens by expert",
        ),
    ],
)  # fmt: skip
def test_right(family, more, count, tmp_path):
    """Lengths differ, batches are padded: rows of an expert come from some positions of some."""
    assert len(check(made(family, **more), tmp_path)) == count


def test_covariances_are_of_the_tokens_that_were_routed_there(tmp_path):
    """And padding, which is routed as well, is not counted."""
    model, data = made("Mixtral", **MIXTRAL), corpus(8)
    factors = fit(model, data, out=tmp_path / "f", batch_tokens=60)
    cov = load_tensors(tmp_path / "f" / "activation_covariance.safetensors")
    count = load_tensors(tmp_path / "f" / "num_activation_covariance_processed.safetensors")
    held = model.model.layers[1].mlp.experts
    seen = []
    handle = held.register_forward_hook(lambda _, args, __: seen.append(args[:2]))
    for example in data:
        model(input_ids=torch.tensor([example["input_ids"]]))
    handle.remove()
    hidden, index = (torch.cat(x) for x in zip(*seen, strict=True))
    for e in range(4):
        rows = hidden[(index == e).any(1)]
        for name in (f"model.layers.1.mlp.experts.{p}.{e}" for p in ("gate_up_proj", "down_proj")):
            assert int(count[name]) == len(rows)
        close(cov[f"model.layers.1.mlp.experts.gate_up_proj.{e}"], rows.T @ rows, 1e-6)
    assert sum(int(count[n]) for n in factors if "1.mlp.experts.down" in n) == 2 * len(hidden)


def test_detail_is_by_position(tmp_path):
    """Per token, a layer's detail adds up to the score; a token counts where it was routed."""
    model, data = made("Mixtral", **MIXTRAL), corpus(8)
    factors = fit(model, data, out=tmp_path / "f", batch_tokens=60)
    prepared = prepare_queries(model, factors, asked(2), rank=4)
    scores = score(model, prepared, data, out=tmp_path / "s", batch_tokens=60, per_token=True)
    one = score(model, prepared, data, out=tmp_path / "t", batch_tokens=1, per_token=True)
    for mine, alone in zip(scores.details(0), one.details(0), strict=True):
        assert mine.per_layer_token.shape == (16, len(data[mine.index]["input_ids"]))
        assert mine.per_layer_token.sum() == pytest.approx(mine.score, 1e-9)
        close(torch.tensor(mine.per_layer_token), torch.tensor(alone.per_layer_token), 1e-6)
        assert (mine.per_layer_token == 0).any()


def test_an_expert_without_tokens_is_left_out(tmp_path):
    """Its router never chooses it."""
    data = corpus(8)
    biased = made("GptOss", **MIXTRAL | {"head_dim": 8})
    with torch.no_grad():
        biased.model.layers[0].mlp.router.bias[2] = -1e3
    with pytest.warns(
        Notice, match=r"routed to .*experts\.gate_up_proj\.2, .*these 4 of 16 layers"
    ):
        factors = fit(biased, data, out=tmp_path / "f", batch_tokens=60)
    assert len(factors) == 12
    prepared = prepare_queries(biased, factors, asked(2), rank=None)
    found = score(biased, prepared, data, out=tmp_path / "s").matrix
    assert torch.isfinite(torch.tensor(found)).all()


def test_killed_between_its_passes_it_ends_in_the_same_bits(tmp_path, monkeypatch):
    model, data = made("Mixtral", **MIXTRAL), corpus(8)
    whole = fit(model, data, out=tmp_path / "f", batch_tokens=60)
    from ekfac_fast.stages import fit as stage

    class Killed(Exception):
        pass

    def killed(self):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(stage._Fit, "_bases", killed)
        with pytest.raises(Killed):
            fit(model, data, out=tmp_path / "g", batch_tokens=60)
    again = fit(model, data, out=tmp_path / "g", batch_tokens=60)
    assert Stage.COVARIANCE in again.seconds
    for name in whole:
        assert torch.equal(whole[name].lam, again[name].lam)


def test_a_plan_counts_an_experts_share_of_the_tokens():
    model = made("Mixtral", **MIXTRAL)
    layers = select_layers(model)
    assert {layer.share for layer in layers} == {0.5}
    sizes = {"parameters": 10_000, "sequences": 8, "tokens": 64, "fit_sequences": 8, "queries": 2}
    shared = plan(layers, **sizes, rate=1e9)
    every = plan([replace(layer, share=1.0) for layer in layers], **sizes, rate=1e9)
    for mine, all_of_it in zip(shared.stages, every.stages, strict=True):
        least = 1.0 if mine.name == "eigendecomposition" else 0.3
        assert least * all_of_it.flops <= mine.flops <= max(least, 0.8) * all_of_it.flops


def test_experts_by_name():
    model = made("Mixtral", **MIXTRAL)
    assert len(select_layers(model, "*.experts.*")) == 16
    (one,) = select_layers(model, "model.layers.1.mlp.experts.down_proj.3")
    assert (one.I, one.O, one.bias, one.expert) == (24, 16, False, 3)
    assert len(select_layers(model, "all")) == 16 + 8 + 1
    with pytest.raises(ArgumentError, match=r"nearest are .*experts\.down_proj\.3"):
        select_layers(model, "model.layers.1.mlp.experts.down_proj.4")


def test_some_experts_of_a_block_alone(tmp_path):
    wanted = ["*.experts.down_proj.1", "*.q_proj", "*.1.mlp.experts.gate_up_proj.0"]
    assert len(check(made("Mixtral", **MIXTRAL), tmp_path, wanted)) == 5


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_compute_experts_again(reentrant, tmp_path):
    found = []
    for checkpoints in (False, True):
        model = made("Mixtral", **MIXTRAL)
        if checkpoints:
            model.train()  # without dropout; transformers checkpoints in training mode alone
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        out = tmp_path / str(checkpoints)
        factors = fit(model, corpus(8), out=out / "f", batch_tokens=60)
        prepared = prepare_queries(model, factors, asked(2), rank=None)
        matrix = score(model, prepared, corpus(8), out=out / "s", batch_tokens=60).matrix
        found.append(torch.tensor(matrix))
    close(found[1], found[0], 1e-6)


def test_the_model_is_as_it_was(tmp_path):
    model = made("Mixtral", **MIXTRAL)
    fit(model, corpus(4), out=tmp_path / "f")
    assert not [m for m in model.modules() if "forward" in vars(m) or m._forward_hooks]


def test_what_is_refused(tmp_path):
    model, data = made("Mixtral", **MIXTRAL), corpus(4)
    held = model.model.layers[0].mlp.experts
    held.forward = type(held).forward.__get__(held)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.experts .* has been replaced already"):
        fit(model, data, out=tmp_path / "f")
    del held.forward
    model = made("Mixtral", **MIXTRAL)
    model.model.layers[1].mlp.experts.has_gate = False  # marks that are not true
    model.model.layers[1].mlp.experts.up_proj = torch.nn.Parameter(torch.zeros(4, 24, 16).double())
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts .* not compute what its marks"):
        fit(model, data, out=tmp_path / "g")


def test_rows_go_where_their_tokens_stand():
    """Tokens position by position (two sequences of three), an expert of all, of some, of none."""
    index = torch.tensor([[0, 1], [0, 3], [0, 1], [1, 0], [0, 4], [0, 1]])
    routing = Routing.chosen(torch.randn(6, 2), index, 4)  # a number of 4 is nobody's
    assert [x.tolist() for x in routing.tokens] == [[0, 1, 2, 3, 4, 5], [0, 2, 3, 5], [], [1]]
    places = Places(routing.tokens, torch.tensor([[0, 2, 4], [1, 3, 5]]))
    assert places.of(1).tolist() == [[0, 1], [1, 2]]
    assert places.of(2).tolist() == [[-1], [-1]]
    assert places.of(3).tolist() == [[-1], [0]]
    x = torch.tensor([[10.0], [12.0], [13.0], [15.0]])
    assert places.spread(x, 1)[..., 0].tolist() == [[10, 12], [13, 15]]


def test_an_ablation_counts_an_experts_own_tokens(tmp_path):
    """K-FAC's eigenvalues of an expert are those of the tokens that were routed to it."""
    factors = fit(made("Mixtral", **MIXTRAL), corpus(8), out=tmp_path / "f")
    kfac = kfac_factors(factors, tmp_path / "k")
    read = lambda name: load_tensors(tmp_path / "f" / name)  # noqa: E731
    counts = read("num_activation_covariance_processed.safetensors")
    assert len({int(x) for x in counts.values()}) > 2
    for name in factors:
        sides = (read(f"{side}_eigenvalues.safetensors")[name].clamp(min=0) for side in
                 ("gradient", "activation"))  # fmt: skip
        close(kfac[name].lam, int(counts[name]) / 8 * torch.outer(*sides), 1e-9)


def test_a_step_and_its_taking_back_move_parameters_once(tmp_path):
    model, data = made("Mixtral", **MIXTRAL), corpus(8)
    queries = prepare_queries(model, fit(model, data, out=tmp_path / "f"), asked(2), rank=4)
    scores = score(model, queries, data, out=tmp_path / "s")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    changes = step_check(model, queries, scores, data)
    assert len(changes) == 2
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "Llama4"])
def test_bfloat16_passes_of_experts(family, tmp_path):
    more = {"GptOss": {"head_dim": 8}, "Llama4": {"intermediate_size_mlp": 24}}.get(family, {})
    model, data = made(family, **MIXTRAL | more).float(), corpus(8)
    found = []
    for autocast in (None, torch.bfloat16):
        out = tmp_path / str(autocast)
        factors = fit(model, data, out=out / "f", autocast=autocast)
        queries = prepare_queries(model, factors, asked(2), rank=4, autocast=autocast)
        matrix = score(model, queries, data, out=out / "s", autocast=autocast).matrix
        found.append(torch.tensor(matrix))
    assert torch.isfinite(found[1]).all()
    assert (found[0] * found[1]).sum() > 0.5 * found[0].norm() * found[1].norm()
