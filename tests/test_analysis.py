"""Sparse tokens, spans, layers, tails: hand examples and known distributions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ekfac_fast.report import statistics as analysis
from ekfac_fast.report.contents import RankedSequence
from ekfac_fast.report.statistics import NoFit, PowerLaw
from ekfac_fast.stages.trust import SPARSE, sparsity

finite = st.floats(-1e6, 1e6).filter(lambda v: v == 0 or abs(v) > 1e-6)


def pareto(alpha: float, n: int, seed: int = 0) -> np.ndarray:
    """Density ~ x^-alpha above 1."""
    return 1 + np.random.default_rng(seed).pareto(alpha - 1, size=n)


@pytest.mark.parametrize(
    ("per_token", "value", "flagged"),
    [
        ([0, -3.0, 0], 1, True),
        ([1, 1], 1 / math.sqrt(2), True),
        ([2, -2, 2], 1 / math.sqrt(3), False),
        ([1e-300, 1e-300], 1 / math.sqrt(2), True),
        ([0, 0], 0, False),
        ([], 0, False),
    ],
    ids=["one token", "two equal", "three equal, signs differ", "tiny", "all zero", "empty"],
)
def test_sparsity_of_hand_examples(per_token, value, flagged):
    assert sparsity(per_token) == pytest.approx(value)
    assert (sparsity(per_token) > SPARSE) is flagged


@given(arrays(float, st.integers(1, 30), elements=finite), st.sampled_from([-7.0, 1e-9, 1e9]))
def test_sparsity_is_bounded_and_scale_free(per_token, scale):
    value = sparsity(per_token)
    assert 0 <= value <= 1 + 1e-12
    assert sparsity(per_token * scale) == pytest.approx(value)


def test_spans_cover_both_peaks_in_reading_order():
    weights = np.zeros(1000)
    weights[700:704] = 2
    weights[100] = 3
    late, early = analysis.spans(weights, width=20), analysis.spans(weights, width=20, limit=1)
    assert [(100 in range(s.start, s.stop), s.stop - s.start) for s in late] == [
        (True, 20),
        (False, 20),
    ]
    assert [s.share for s in late] == pytest.approx([3 / 11, 8 / 11])
    assert early[0].start <= 700 < 704 <= early[0].stop
    assert abs((early[0].start + early[0].stop) / 2 - 702) <= 1  # centred on what it holds


def test_spans_of_short_flat_and_empty_sequences():
    assert analysis.spans([1, 2, 3], width=8) == (analysis.Span(0, 3, 1.0),)
    assert analysis.spans(np.zeros(50), width=8) == (analysis.Span(0, 8, 0.0),)
    assert analysis.spans([]) == ()
    with pytest.raises(ValueError, match=">= 0"):
        analysis.spans([1.0, -1.0])


@given(
    arrays(float, st.integers(1, 300), elements=st.floats(0, 10)),
    st.integers(1, 40),
    st.integers(1, 4),
)
def test_spans_are_disjoint_sorted_and_inside(weights, width, limit):
    found = analysis.spans(weights, width=width, limit=limit)
    edges = [edge for span in found for edge in (span.start, span.stop)]
    assert edges == sorted(set(edges))
    assert 0 <= edges[0] < edges[-1] <= len(weights)
    assert edges[1] - edges[0] >= min(width, len(weights))


@pytest.mark.parametrize("layers", [1, 4, 9, 10, 24, 64])
def test_layer_groups_are_equal_and_keep_the_sum(layers):
    groups = analysis.layer_groups(np.ones(layers))
    assert len(groups) == min(layers, 9)
    np.testing.assert_allclose(groups, layers / len(groups))
    detail = np.random.default_rng(0).normal(size=(layers, 5))
    np.testing.assert_allclose(analysis.layer_groups(detail).sum(0), detail.sum(0), atol=1e-12)
    np.testing.assert_allclose(
        analysis.layer_groups(detail).sum(1), analysis.layer_groups(detail.sum(1)), atol=1e-12
    )


def test_layer_groups_of_multiples_are_plain_sums():
    np.testing.assert_allclose(
        analysis.layer_groups(np.arange(18.0)), np.arange(18).reshape(9, 2).sum(1)
    )


def test_layer_shares_and_centre_of_mass():
    np.testing.assert_allclose(analysis.layer_shares([1, -1, 2]), [0.25, -0.25, 0.5])
    np.testing.assert_allclose(analysis.layer_shares([0, 0]), [0, 0])
    assert analysis.centre_of_mass([0, 0, 5]) == 1
    assert analysis.centre_of_mass([1, 0, -1]) == 0.5
    assert analysis.centre_of_mass([3]) == 0.5
    assert math.isnan(analysis.centre_of_mass([0, 0]))


@pytest.mark.parametrize("alpha", [2.0, 2.3, 3.5])
def test_power_law_recovers_the_exponent(alpha):
    fit = analysis.power_law(np.concatenate([pareto(alpha, 5000), -np.ones(5000)]), tail=1000)
    assert isinstance(fit, PowerLaw)
    assert fit.alpha == pytest.approx(alpha, abs=4 * (alpha - 1) / math.sqrt(1000))
    assert fit.ccdf_exponent == fit.alpha - 1
    assert fit.p_value > 0.1
    assert fit.fraction == 0.1
    assert fit.ccdf(fit.xmin) == pytest.approx(0.1)


def test_power_law_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    x = pareto(2.5, 3000)
    fit = analysis.power_law(x, draws=1)
    tail = np.sort(x)[-fit.count :]
    shape, _, scale = stats.pareto.fit(tail, floc=0, fscale=fit.xmin)
    assert (fit.ccdf_exponent, fit.xmin) == (pytest.approx(shape), scale)
    assert fit.ks == pytest.approx(stats.kstest(tail, stats.pareto(shape, 0, scale).cdf).statistic)


def test_exponential_scores_are_rejected():
    fit = analysis.power_law(np.random.default_rng(1).exponential(size=5000))
    assert fit.count == 500
    assert fit.p_value < 0.01


def test_p_values_are_uniform_under_the_power_law():
    p = [analysis.power_law(pareto(2.5, 400, s), tail=60, draws=100).p_value for s in range(60)]
    assert 0.35 < np.mean(p) < 0.65
    assert np.mean(np.array(p) < 0.1) < 0.25


def test_power_law_is_reproducible_and_scale_free():
    x = pareto(2.5, 3000)
    fit, scaled = analysis.power_law(x, seed=3), analysis.power_law(x * 1e-6, seed=3)
    assert fit == analysis.power_law(x, seed=3)
    assert (fit.alpha, fit.p_value) == (pytest.approx(scaled.alpha), scaled.p_value)


def test_scan_size_until_ten_sequences_are_as_strong():
    fit = PowerLaw(alpha=3, xmin=1, count=100, fraction=1e-3, ks=0, p_value=1)
    assert fit.scan_for(10, 10) == pytest.approx(10 / (1e-3 * 10**-2))


@pytest.mark.parametrize(
    ("scores", "why"),
    [
        ([], "0 positive scores"),
        ([1.0] * 30, "30 positive scores"),
        (-np.arange(1000.0), "0 positive scores"),
        ([math.nan] * 1000, "0 positive scores"),
        (np.ones(1000), "all equal"),
    ],
    ids=["empty", "few", "negative", "never scanned", "constant"],
)
def test_no_fit_says_why(scores, why):
    fit = analysis.power_law(scores)
    assert isinstance(fit, NoFit)
    assert why in fit.reason


def test_ccdf_points_count_ties_and_all_scanned():
    x, p = analysis.ccdf_points([math.nan, -1, 0, 2, 2, 4])
    assert x.tolist() == [2, 4]
    np.testing.assert_allclose(p, [3 / 5, 1 / 5])
    assert [part.size for part in analysis.ccdf_points([])] == [0, 0]


def test_ccdf_points_are_thinned_but_keep_both_ends():
    scores = pareto(2.5, 20_000)
    x, p = analysis.ccdf_points(scores, limit=100)
    assert 50 < len(x) <= 100
    assert (x[0], x[-1]) == (scores.min(), scores.max())
    assert (p[0], p[-1]) == (1, 1 / 20_000)
    assert np.all(np.diff(x) > 0)


def test_top_share_is_of_the_positive_influence():
    scores = [math.nan] + [-5.0] * 50 + [0.0] * 48 + [1.0, 3.0]
    assert analysis.top_share(scores, 0.01) == 0.75
    assert analysis.top_share(scores, 0.02) == 1
    assert analysis.top_share([-1.0, 0.0]) == 0
    assert analysis.top_share([]) == 0


def test_ranked_sequence_checks_shapes_and_knows_sparsity():
    sequence = RankedSequence(7, 1.0, ("a", "b"), np.array([1.0, 0.0]), np.ones(3))
    assert sequence.sparse
    with pytest.raises(ValueError, match=r"sequence 7: 2 tokens, .* \(3,\)"):
        RankedSequence(7, 1.0, ("a", "b"), np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match=r"\[L,T\] = \(3, 2\), got \(2, 3\)"):
        RankedSequence(7, 1.0, ("a", "b"), np.ones(2), np.ones(3), np.ones((2, 3)))
