"""Dense or low rank: the cheaper way to score with queries that were truncated, from a shape."""

from typing import Literal

from ..ops import dense_scores, low_rank_scores
from ..ops.shapes import Shape

Contraction = Literal["dense", "low_rank"]
# Share of the free memory that low-rank queries may take while they are multiplied out.
DENSE_SHARE = 0.1


def contraction(
    shape: Shape, *, room: float, per_token: bool = False, itemsize: int = 4, batches: float = 1.0
) -> Contraction:
    """Whether L R, then dense scores, needs fewer FLOPs than scoring with L and R.

    So it is for many queries at once: L R costs Q O K J once, the gradient tile then serves all
    queries, while L and R meet every token Q times.

    Args:
        shape: of one batch, with Q queries of rank K; K = 0: they were never truncated.
        room: bytes of free memory, of which dense queries may take `DENSE_SHARE`.
        per_token: scores are [Q,B,T].
        itemsize: bytes of a number of a query.
        batches: how many of this shape are scored with one product L R.
    """
    Q, B, T, O, J, K = shape.Q, shape.B, shape.T, shape.O, shape.J, shape.K
    if not K:
        return "dense"
    if Q * O * J * itemsize >= DENSE_SHARE * room:
        return "low_rank"
    dense = 2 * Q * B * T * O * J if per_token else dense_scores.cost(shape).flops
    once = 2 * Q * O * K * J / batches
    return "dense" if once + dense < low_rank_scores.cost(shape).flops else "low_rank"
