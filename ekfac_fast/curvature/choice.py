"""Dense or low rank: the cheaper way to score with queries that were truncated, from a shape."""

from typing import Literal

from ..ops import dense_scores, low_rank_scores
from ..ops.shapes import Shape

Contraction = Literal["dense", "low_rank"]
# FLOPs in the time of which a number of L R is written and read again: fp32 on a CPU, where its
# memory is mapped anew, page by page, and bf16 on a GPU.
FLOPS_OF_A_NUMBER = 400


def contraction(shape: Shape, *, per_token: bool = False) -> Contraction:
    """Whether L R, then dense scores, takes less time than scoring with L and R.

    So it is for many queries and tokens at once: L R costs Q O K J once, and is as large as Q
    gradients; the gradient tile then serves all queries, while L and R meet every token Q times.

    Args:
        shape: of all sequences that one product L R serves, with Q queries of rank K; K = 0: they
            were never truncated.
        per_token: scores are [Q,B,T].
    """
    Q, B, T, O, J, K = shape.Q, shape.B, shape.T, shape.O, shape.J, shape.K
    if not K:
        return "dense"
    dense = 2 * Q * B * T * O * J if per_token else dense_scores.cost(shape).flops
    once = Q * O * J * (2 * K + FLOPS_OF_A_NUMBER)
    return "dense" if once + dense < low_rank_scores.cost(shape).flops else "low_rank"
