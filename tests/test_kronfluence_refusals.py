"""What the backend refuses: factors of another model, broken covariances and eigenvalues."""

from pathlib import Path

import pytest
import torch
from kronfluence import ScoreArguments
from kronfluence.computer import factor_computer, score_computer
from test_kronfluence_cases import (
    Examples,
    NextToken,
    Pair,
    Sequence,
    Siblings,
    SumLoss,
    examples,
    pytestmark,  # noqa: F401
    small_pair,
    switched_off,  # noqa: F401
    texts,
)
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

import ekfac_fast.kronfluence as fast
from ekfac_fast.errors import ModelError


def test_factors_of_another_model_are_refused(tmp_path: Path) -> None:
    one = small_pair(tmp_path)
    one.fit(False, "stock")
    torch.manual_seed(0)
    data = examples(9, (3, 5), (3, 4)), examples(7, (3, 5), (3, 4))
    other = Pair(Sequence((5, 7, 4), (True, False), inplace=False), SumLoss(), *data, tmp_path)
    with pytest.raises(ValueError, match=r"layers\.1.*\[6, 6\].*\[7, 7\].*another model"):
        other.pairwise(True, "stock", ScoreArguments(), "other")
    deeper = Sequence((5, 6, 4, 4), (True, False, True), inplace=False)
    deeper = Pair(deeper, SumLoss(), *data, tmp_path)
    with pytest.raises(ValueError, match=r"no entry for module 'layers\.2'"):
        deeper.self_scores(True, "stock", ScoreArguments(), "other")
    with pytest.raises(ValueError, match=r"no entry for module 'layers\.2'"):
        deeper.eigen(True, "other", "stock")


def test_convolutions_of_another_model_are_refused(tmp_path: Path) -> None:
    data = [Examples(torch.randn(n, 2, 4, 3), torch.randn(n, 3, 5)) for n in (6, 4)]
    one, other = Siblings(), Siblings()
    other.conv = nn.Conv2d(2, 3, (3, 1), padding=(1, 0))
    Pair(one, SumLoss(modules=["conv"]), *data, tmp_path).fit(True, "stock")
    other = Pair(other, SumLoss(modules=["conv"]), *data, tmp_path)
    with pytest.raises(ValueError, match=r"'conv' has shape \[19, 19\], expected \[7, 7\]"):
        other.pairwise(True, "stock", ScoreArguments(), "other")


@pytest.mark.parametrize("damage", ["nan", "count"])
def test_broken_covariances_are_named(damage: str, tmp_path: Path) -> None:
    one = small_pair(tmp_path)
    factors = one.covariances(True, "fast")
    if damage == "nan":
        factors["gradient_covariance"]["layers.1"][2, 1] = torch.nan
    else:
        factors["num_gradient_covariance_processed"]["layers.1"].zero_()
    message = r"gradient_covariance of module 'layers\.1' \(\[4, 4\].*(NaN|counts no rows)"
    with fast.enabled(), pytest.raises(ValueError, match=message):
        factor_computer.perform_eigendecomposition(
            covariance_factors=factors,
            model=one.model,
            state=one.analyzer.state,
            factor_args=one.factor_args,
            disable_tqdm=True,
        )


def test_broken_eigenvalues_are_named(tmp_path: Path) -> None:
    one = small_pair(tmp_path)
    one.fit(True, "fast")
    factors = one.analyzer.load_all_factors("fast")
    factors["lambda_matrix"]["layers.0"][0, 0] = torch.inf
    with fast.enabled(), pytest.raises(ValueError, match=r"layers\.0.*NaN or infinity"):
        score_computer.compute_self_scores_with_loaders(
            loaded_factors=factors,
            model=one.model,
            state=one.analyzer.state,
            task=one.task,
            train_loader=torch.utils.data.DataLoader(one.train),
            score_args=ScoreArguments(),
            factor_args=one.factor_args,
            tracked_module_names=None,
            disable_tqdm=True,
        )


def test_rows_that_are_no_examples_are_refused(tmp_path: Path) -> None:
    """OPT sees tokens as rows: kronfluence's scores there are [tokens, tokens]."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=61, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, word_embed_proj_dim=16,
    )  # fmt: skip

    class Task(NextToken):
        def get_influence_tracked_modules(self) -> list[str]:
            return ["model.decoder.layers.0.fc1"]

    one = Pair(OPTForCausalLM(config), Task(), texts(4), texts(2), tmp_path)
    with pytest.raises(ModelError, match=r"fc1': its input is \[\d+, 16\] for \d examples: rows"):
        one.fit(True, "fast")
