"""Dense or low rank: the cheaper way to score with queries that were truncated, from a shape."""

from typing import Literal

from ..ops import dense_scores, low_rank_scores
from ..ops.shapes import Shape

Contraction = Literal["dense", "low_rank"]


def contraction(shape: Shape, *, per_token: bool = False) -> Contraction:
    """Whether L R, then dense scores, needs fewer FLOPs than scoring with L and R.

    So it is for many queries at once: L R costs Q O K J once, the gradient tile then serves all
    queries, while L and R meet every token Q times.

    Args:
        shape: of all sequences that one product L R serves, with Q queries of rank K; K = 0: they
            were never truncated.
        per_token: scores are [Q,B,T].
    """
    Q, B, T, O, J, K = shape.Q, shape.B, shape.T, shape.O, shape.J, shape.K
    if not K:
        return "dense"
    dense = 2 * Q * B * T * O * J if per_token else dense_scores.cost(shape).flops
    once = 2 * Q * O * K * J
    return "dense" if once + dense < low_rank_scores.cost(shape).flops else "low_rank"
