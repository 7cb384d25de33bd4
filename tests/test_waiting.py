"""One forward pass for both draws of labels, or two: the same bits."""

import pytest
import torch
from dense_ekfac import corpus, gpt2, llama
from safetensors.torch import load_file
from test_head import softcapped
from torch.utils.checkpoint import checkpoint

from ekfac_fast import LanguageModelTask, fit
from ekfac_fast.stages.waiting import Waiting


def checkpointed(reentrant):
    model = llama()
    for block in model.model.layers:
        forward = block.forward
        block.forward = lambda x, f=forward, **given: checkpoint(
            lambda y: f(y, **given), x, use_reentrant=reentrant
        )
    return model


MAKERS = {
    "gpt2": gpt2,
    "llama": llama,
    "softcap": softcapped,
    "checkpoints": lambda: checkpointed(False),
    "reentrant checkpoints": lambda: checkpointed(True),
}


def factors_of(folder):
    names = ("activation_covariance", "gradient_covariance", "lambda_matrix")
    return {name: load_file(folder / f"{name}.safetensors") for name in names}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("every", [0, 2])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_what_waits_and_what_is_passed_again_are_the_same(tmp_path, monkeypatch, kind, every):
    model, data, passes = MAKERS[kind]().eval(), corpus(), []
    own = LanguageModelTask.sampled_losses
    monkeypatch.setattr(
        LanguageModelTask, "sampled_losses", lambda *args: (passes.append(1), own(*args))[1]
    )
    fit(model, data, out=tmp_path / "one", batch_tokens=40)
    # A pass finds out by its first batch that it has to be run again from its inputs.
    twice = kind == "reentrant checkpoints"
    batches = len(passes) - twice
    taken = [n for n in range(batches) if every and n % every == 0]
    monkeypatch.setattr(Waiting, "takes", lambda _, batch: batch.number in taken)
    fit(model, data, out=tmp_path / "two", batch_tokens=40)
    assert len(passes) == 3 * (batches + twice) - len(taken)
    expected, found = factors_of(tmp_path / "one"), factors_of(tmp_path / "two")
    for name, tensors in expected.items():
        for layer, x in tensors.items():
            assert torch.equal(found[name][layer], x), (name, layer)
