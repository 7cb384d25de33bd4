"""A query's iHVP as parameters of the model: names, shapes, sign, and the weights given back."""

import pytest
import torch
from dense_ekfac import asked, batch_of, corpus, gpt2
from safetensors.torch import load_file
from test_experts import MIXTRAL
from test_model_families import made

from ekfac_fast import fit, prepare_queries
from ekfac_fast.errors import ArgumentError
from ekfac_fast.model.tasks import LanguageModelTask


def prepared(model, folder, **more):
    factors = fit(model, corpus(8), out=folder / "f", **more)
    return prepare_queries(model, factors, asked(2), rank=None)


def measured(model, query):
    return LanguageModelTask().compute_measurement(batch_of(asked(2)[query] | {"id": 0}), model)


MODELS = {
    "GPT-2": lambda: gpt2(torch.float64).eval(),
    "Llama": lambda: made("Llama", num_key_value_heads=2),
    "experts": lambda: made("Mixtral", **MIXTRAL),
    "transposed experts": lambda: made("GptOss", **MIXTRAL | {"head_dim": 8}),
}


@pytest.mark.filterwarnings("ignore:no token of the data")
@pytest.mark.parametrize("name", MODELS)
def test_a_step_along_it_changes_the_query_as_its_own_score_says(name, tmp_path):
    """d f / d alpha = <grad f, iHVP>, by differences, and by autograd on the parameters."""
    model = MODELS[name]()
    queries = prepared(model, tmp_path)
    direction = queries.parameters(model, 1)
    state = model.state_dict()
    assert all(state[n].shape == x.shape for n, x in direction.items())
    held = {n: p for n, p in model.named_parameters() if n in direction}
    gradients = torch.autograd.grad(measured(model, 1), list(held.values()))
    slope = sum((g * direction[n]).sum() for n, g in zip(held, gradients, strict=True))
    assert slope > 0
    step = 1e-4 / max(x.abs().max() for x in direction.values()).item()
    with torch.no_grad():
        with queries.apply(model, step, 1):
            above = measured(model, 1)
        with queries.apply(model, -step, 1):
            below = measured(model, 1)
        assert below < measured(model, 1) < above
    assert ((above - below) / (2 * step)).item() == pytest.approx(
        slope.item(), rel=1e-3
    )  # norms in fp32


def test_the_weights_come_back_bitwise_whatever_happens(tmp_path):
    model = gpt2().eval()
    queries = prepared(model, tmp_path)
    before = {n: x.clone() for n, x in model.state_dict().items()}

    def other():
        return [n for n, x in model.state_dict().items() if not torch.equal(x, before[n])]

    def interrupted():
        with queries.apply(model, 0.3):
            assert other()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert not other()


def test_exported_it_is_one_line(tmp_path):
    model = gpt2().eval()
    queries = prepared(model, tmp_path, layers=["*.0.mlp.*"])
    ihvp = load_file(queries.export(tmp_path / "ihvp.safetensors", model))
    assert sorted(ihvp) == sorted(
        f"transformer.h.0.mlp.{x}.{p}" for x in ("c_fc", "c_proj") for p in ("weight", "bias")
    )
    state, other = model.state_dict(), gpt2().eval()
    other.load_state_dict(state | {n: state[n] - 1e-3 * x for n, x in ihvp.items()})
    assert measured(other, 0) < measured(model, 0)
    with queries.apply(model, -1e-3):
        assert torch.equal(measured(model, 0), measured(other, 0))


def test_what_is_refused(tmp_path):
    model = gpt2().eval()
    queries = prepared(model, tmp_path)
    other = made("Llama", num_key_value_heads=2)
    with pytest.raises(ArgumentError, match=r"parameters: the queries were prepared on a model of"):
        queries.parameters(other)
    with pytest.raises(ArgumentError, match="query is 2, expected"):
        queries.parameters(model, 2)
    for alpha in (float("nan"), "1", None):
        with (
            pytest.raises(ArgumentError, match=r"alpha is .*, expected a finite number"),
            queries.apply(model, alpha),
        ):
            pass


def test_a_tied_parameter_goes_by_its_first_name(tmp_path):
    model = gpt2().eval()
    model.lm_head.weight = model.transformer.wte.weight
    more = {"layers": ["lm_head"], "shared_parameters": True}
    queries = prepared(model, tmp_path, **more)
    assert [*queries.parameters(model)] == ["transformer.wte.weight"]
