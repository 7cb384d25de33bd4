"""How far scores can be trusted: what was left out on the way to them, in one line."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from ..store.folder import Store
from .factors import blocks_of
from .sample import sample_of

if TYPE_CHECKING:
    from .queries import Queries

SPARSE = 2 / 3


def sparsity(per_token: ArrayLike) -> float:
    """||a||_2 / ||a||_1 of token-wise influences [T]: 1 for one token, 0 where all are zero.

    Above 2/3 one or two tokens carry the score, likely spurious (paper 5.3).
    """
    a = np.abs(np.asarray(per_token, dtype=np.float64))
    largest = a.max(initial=0.0)
    if largest == 0:
        return 0.0
    a = a / largest  # squares of tiny or huge influences stay in range
    return float(np.sqrt(np.square(a).sum()) / a.sum())


@dataclass(frozen=True)
class Trust:
    """What a reader of scores should know before believing them.

    rank, energy     of the queries; the least share of a gradient's energy that is kept
    damping          from least to most over layers
    blocks           on the diagonal of each covariance; beyond 1 the basis is approximate
    diagonal         layers of which output gradients are covaried by a diagonal alone
    eigenvectors     the dtype that they were rounded to, if they were
    sample           examples that eigenvalues are from, where they are not all that were fitted on
    refined          how queries were refined, and the largest relative residual that is left
    sparse           share of the top sequences that one or two tokens carry; None without details
    validation       what they were held against, and how well they predicted it
    """

    rank: int | None
    energy: float
    least_damping: float
    most_damping: float
    refined: str | None
    residual: float | None
    sparse: float | None = None
    validation: str | None = None
    blocks: int = 1
    diagonal: int = 0
    eigenvectors: str | None = None
    sample: int | None = None

    @property
    def line(self) -> str:
        """In words."""
        said = ["full rank"] if self.rank is None else [
            f"rank {self.rank} keeps at least {self.energy:.0%} of a gradient's energy"
        ]  # fmt: skip
        said += approximations(self.blocks, self.diagonal, self.eigenvectors, self.sample)
        said.append(f"damping {self.least_damping:.2g} to {self.most_damping:.2g}")
        said.append(
            "not refined"
            if self.refined is None
            else f"refined by {self.refined}, residual at most {self.residual:.1e}"
        )
        if self.sparse is not None:
            said.append(f"{self.sparse:.0%} of the top sequences rest on one or two tokens")
        said.append(self.validation or "not held against retraining")
        return "; ".join(said)


def basis_of(blocks: int) -> str:
    """A basis of so many diagonal blocks, in words."""
    return f"basis of covariances in {blocks} diagonal blocks, approximate beside the exact one"


def approximations(
    blocks: int, diagonal: int, eigenvectors: str | None, sample: int | None
) -> list[str]:
    """What a fit left out, in words; see `Trust`."""
    said = [basis_of(blocks)] if blocks > 1 else []
    if diagonal:
        said.append(f"output gradients of {diagonal} layers as if uncorrelated (a diagonal)")
    if eigenvectors:
        said.append(f"eigenvectors rounded to {eigenvectors}")
    if sample:
        said.append(f"eigenvalues corrected on {sample:,} of the examples")
    return said


def trust_in(queries: "Queries") -> dict[str, Any]:
    """What queries say of the scores that they will give, as JSON."""
    refinement, blocks = queries.refinement, blocks_of(queries.facts)
    facts = queries.facts or {}
    diagonal, rounded = len(facts.get("diagonal", [])), facts.get("eigenvectors")
    approximate = {
        "blocks": blocks if blocks > 1 else 0, "diagonal": diagonal, "eigenvectors": rounded,
        "sample": sample_of(facts),
    }  # fmt: skip
    return {name: value for name, value in approximate.items() if value} | {
        "rank": queries.rank,
        "energy": min(
            (float(x.energy.min()) for x in queries.layers if len(x.energy)), default=1.0
        ),
        "least_damping": min(queries.damping, default=0.0),
        "most_damping": max(queries.damping, default=0.0),
        "refined": None if refinement is None else refinement.method,
        "residual": None if refinement is None else float(refinement.residual.max()),
    }


def note_validation(folder: Path, line: str) -> None:
    """Keep with a finished scan what it was held against."""
    facts = Store.load(folder, kind="scores").facts
    with Store.open(folder, kind="scores", facts=facts) as store:
        store.update(validation=line)
