"""Families of models, tiny, in fp64: factors and scores against gradients of the parameters."""

import numpy as np
import pytest
import torch
import transformers
from dense_ekfac import CONTEXT, VOCABULARY, asked, batch_of, close, corpus, weight_gradient

from ekfac_fast.curvature.basis import Eigenvectors, SharedRotation
from ekfac_fast.errors import ArgumentError, ModelError
from ekfac_fast.model.layers import select_layers
from ekfac_fast.model.rows import Rows
from ekfac_fast.model.tasks import LanguageModelTask
from ekfac_fast.stages.fit import fit
from ekfac_fast.stages.preparation import prepare_queries
from ekfac_fast.stages.scan import score
from ekfac_fast.store.files import load_tensors

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": CONTEXT, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Shorter than the padding: eager attention's mask is -inf there in fp64.
WINDOW = {"num_key_value_heads": 1, "sliding_window": 4, "attention": "sdpa"}
ZAMBA = {
    "num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    "num_key_value_heads": 2, "attention_hidden_size": 32, "attention_head_dim": 16,
    "mamba_d_state": 4, "mamba_dt_rank": 2, "n_mamba_heads": 2, "use_mamba_kernels": False,
}  # fmt: skip


def made(family, attention="eager", **more):
    """A model in fp64, weights drawn so that no path is nearly zero."""
    text = ("Llama4", "Gemma3")
    kind = f"{family}TextConfig" if family in text else f"{family}Config"
    config = getattr(transformers, kind)(**SIZES | more)
    head = {"Roberta": "RobertaForCausalLM"}.get(family, f"{family}ForCausalLM")
    torch.manual_seed(0)
    model = getattr(transformers, head)._from_config(
        config, attn_implementation=attention, experts_implementation="eager"
    )
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape) if p.ndim > 1 else p + 0.05 * torch.randn(p.shape))
    return model.double().eval()


def inputs(model, layers, data):
    """sum a a^T of every layer, from plain hooks and sequences without padding.

    DoRA runs its matrices on an identity, too, for a norm that has no gradient.
    """
    sums, handles = {}, []
    for x in (x for x in layers if x.expert is None):

        def hook(module, args, output, x=x):
            if args[0].ndim == 2 and torch.equal(args[0], torch.eye(len(args[0])).to(args[0])):
                output.identity = True
            if getattr(args[0], "identity", False) or getattr(output, "identity", False):
                return
            a = args[0].detach().reshape(-1, x.I)
            a = torch.cat([a, a.new_ones(len(a), 1)], 1) if x.bias else a
            sums[x.name] = sums.get(x.name, 0) + a.T @ a

        for name in (x.name, *x.also):
            handles.append(model.get_submodule(name).register_forward_hook(hook))
    for example in data:
        LanguageModelTask().compute_train_loss(batch_of(example), model)
    for handle in handles:
        handle.remove()
    return sums


def check(model, tmp_path, wanted=None, shared=False, tolerance=1e-6, blocks=1, **more):
    """fit, prepare_queries and score against one sequence at a time."""
    data = [example | {"id": i} for i, example in enumerate(corpus(8))]
    queries = [example | {"id": i} for i, example in enumerate(asked(2))]
    layers, more = select_layers(model, wanted, shared=shared), {"batch_tokens": 60} | more
    how = {"layers": wanted, "shared_parameters": shared, "blocks": blocks}
    f = fit(model, data, out=tmp_path / "f", **how, **more)
    prepared = prepare_queries(model, f, queries, rank=None, **more)
    found = score(model, prepared, data, out=tmp_path / "s", **more).matrix
    covariances = load_tensors(tmp_path / "f" / "activation_covariance.safetensors")
    for name, expected in inputs(model, layers, data).items():
        for rows in np.array_split(np.arange(len(expected)), blocks):
            found_here = covariances[name][rows][:, rows]
            close(found_here, expected[rows][:, rows], tolerance)
    task, scores = LanguageModelTask(), 0

    def rotated(examples, name, loss):
        return torch.stack([
            f[name].Qg.T @ weight_gradient(model, name, loss(batch_of(e), model)) @ f[name].Qa
            for e in examples
        ])  # fmt: skip

    for name in (x.name for x in layers):
        sampled = rotated(data, name, lambda b, m: task.compute_train_loss(b, m, sample=True))
        lam = sampled.square().mean(0)
        close(f[name].lam, lam, tolerance)
        P = rotated(queries, name, task.compute_measurement) / (lam + 0.1 * lam.mean())
        scores += torch.einsum("qoj,boj->qb", P, rotated(data, name, task.compute_train_loss))
    close(found, scores, tolerance)
    return [x.name for x in layers]


@pytest.mark.parametrize(
    ("family", "more", "wanted", "count"),
    [
        # Grouped queries: k and v are narrower than some batches are long, q is not.
        pytest.param("Llama", {"num_key_value_heads": 1}, ["all"], 15, id="dense"),
        pytest.param("OPT", {"ffn_dim": 24, "word_embed_proj_dim": 16}, None, 4, id="OPT"),
        pytest.param("Bloom", {}, None, 4, id="ALiBi"),
        pytest.param("GPTNeoX", {}, None, 4, id="parallel residual"),
        pytest.param("Mistral", WINDOW, None, 6, id="sliding window"),
        pytest.param("Roberta", {"is_decoder": True}, None, 4, id="RoBERTa"),
        pytest.param(
            "Qwen2Moe",
            {"num_experts": 4, "moe_intermediate_size": 8, "num_key_value_heads": 2,
             "shared_expert_intermediate_size": 12},
            ["*.shared_expert.*"], 6, id="flattened shared experts",
        ),
        pytest.param("XLM", {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "causal": True}, None, 4,
                     id="a list of MLPs"),
    ],
)  # fmt: skip
def test_right(family, more, wanted, count, tmp_path, monkeypatch):
    if family == "XLM":
        monkeypatch.setattr(transformers, "XLMForCausalLM", transformers.XLMWithLMHeadModel, False)
    assert len(check(made(family, **more), tmp_path, wanted)) == count


def test_state_space_has_no_default_and_is_right_by_name(tmp_path):
    model = made("Mamba", state_size=4, time_step_rank=2)
    with pytest.raises(ArgumentError, match=r"name of an MLP.*mixer.in_proj"):
        select_layers(model)
    # The weight of dt_proj is read by other code than its own.
    with pytest.raises(ModelError, match=r"dt_proj did not run"):
        check(model, tmp_path / "all", ["*.mixer.*"])
    check(model, tmp_path, ["*.in_proj", "*.x_proj", "*.out_proj"])


def test_a_transformer_shared_by_two_blocks_is_one_with_the_flag(tmp_path):
    model = made("Zamba", **ZAMBA)
    with pytest.raises(ArgumentError, match=r"shared_transf.*shared_parameters=True"):
        select_layers(model)
    assert len(check(model, tmp_path, shared=True)) == 3


def test_encoder_and_decoder_are_refused(tmp_path):
    config = transformers.BartConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24,
        decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config)
    with pytest.raises(ValueError, match="causal language model"):
        fit(model, corpus(4), out=tmp_path / "f")


def test_experts_in_one_matrix_are_no_default():
    dbrx = torch.nn.Module()
    dbrx.experts = torch.nn.Module()
    dbrx.experts.w1 = torch.nn.Parameter(torch.zeros(8, 4))  # all experts' rows in one matrix
    model = torch.nn.ModuleDict({"ffn": torch.nn.ModuleList([dbrx])})
    with pytest.raises(ArgumentError, match=r"experts in one tensor \(ffn.0.experts.w1\)"):
        select_layers(model)


def test_a_block_diagonal_layer_is_refused(tmp_path):
    class Grouped(torch.nn.Linear):
        def forward(self, x):
            groups = self.weight.unflatten(0, (2, -1))
            return torch.einsum("btgi,goi->btgo", x.unflatten(-1, (2, -1)), groups).flatten(2)

    model = made("Llama", num_key_value_heads=2)
    down = Grouped(12, 16, bias=False).double()
    model.model.layers[0].mlp.down_proj = down
    with pytest.raises(ModelError, match=r"mlp.down_proj .Grouped. does not compute W x \+ b"):
        fit(model, corpus(4), out=tmp_path / "f")


def test_a_model_that_padding_changes_takes_one_sequence_a_batch(tmp_path):
    """Streams of n-grams lie behind the text in its layers, and lengths change their positions."""
    more = {"decoder_ffn_dim": 24, "num_decoder_layers": 1, "num_decoder_attention_heads": 2}
    del (sizes := dict(SIZES))["num_hidden_layers"]
    config = transformers.ProphetNetConfig(
        **sizes | more, encoder_ffn_dim=24, num_encoder_layers=1, add_cross_attention=False,
        num_encoder_attention_heads=2, is_encoder_decoder=False, is_decoder=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ProphetNetForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape))
    with pytest.raises(ModelError, match=r"padding behind a sequence.*batch_tokens=1"):
        check(model, tmp_path)
    check(model, tmp_path, tolerance=1e-5, batch_tokens=1)


def test_rows_that_are_no_positions_have_no_mask():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert Rows(2, 3).real(mask).tolist() == [1, 1, 1, 1, 0, 0]
    assert Rows(2, 4, before=1).real(mask).tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    assert Rows(2, 3, uses=2).real(mask).sum() == 8
    # Patches or further streams: fewer or more than positions, and nothing says which are padding.
    for rows in (Rows(2, 4), Rows(2, 2), Rows(2, 6, before=1)):
        assert rows.real(mask) is None
    assert Rows(2, 4).real(torch.ones(2, 3)) is None
    assert Rows(1, 7).real(torch.ones(1, 3)).tolist() == [True] * 7


def test_a_shared_rotation_begins_anew_with_every_batch():
    """Three layers read one tensor, two of them narrower than the batch is long."""
    torch.manual_seed(0)
    rotate, Qa = SharedRotation(), torch.linalg.qr(torch.randn(6, 6))[0]
    for _ in range(2):
        a = torch.randn(2, 5, 6)
        for O in (8, 3, 3):
            basis = Eigenvectors(torch.eye(O), Qa)
            got = rotate(basis, torch.randn(2, 5, O), a, False, "owner", 3)
            if O == 8:
                close(got[1], a @ Qa, 1e-6)
            else:
                assert got[1] is a
