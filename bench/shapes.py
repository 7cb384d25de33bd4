"""Shapes that benches time: the MLP matrices of four models, and the acceptance table."""

from collections.abc import Iterator
from dataclasses import dataclass

from ekfac_fast.ops.shapes import Shape


@dataclass(frozen=True)
class Case:
    """One row: a quantity (an op's stem, or "queries") on one shape."""

    name: str
    quantity: str
    shape: Shape
    per_token: bool = False

    @property
    def label(self) -> str:
        """What the row is called."""
        s = self.shape
        sizes = f"{s.I} x {s.O}" if s.O > 1 else f"F={s.I}"
        parts = [f"{self.quantity}{' per token' if self.per_token else ''}", self.name, sizes]
        parts.append(f"B={s.B} T={s.T}" if s.O > 1 else f"N={s.N}")
        parts += [f"Q={s.Q}"] * (s.Q > 0 and s.O > 1) + [f"K={s.K}"] * (s.K > 0)
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Requirement:
    """One number of the acceptance table: at least `ratio` times `against`."""

    case: Case
    dtype: str
    against: str  # a row of kronfluence_order, "own fp32" or "GEMM roof"
    ratio: float


# name: (B, T, bias, {matrix: (I, O)}); B shrinks with the model to keep a call within seconds.
MODELS = {
    "gpt2": (8, 512, True, {"c_fc": (768, 3072), "c_proj": (3072, 768)}),
    "pythia-1b": (4, 512, True, {"h_to_4h": (2048, 8192), "4h_to_h": (8192, 2048)}),
    "llama-3-8b": (2, 512, False, {"gate, up": (4096, 14336), "down": (14336, 4096)}),
    "qwen2.5-7b": (2, 512, False, {"gate, up": (3584, 18944), "down": (18944, 3584)}),
    "small": (3, 33, True, {"c_fc": (96, 161), "c_proj": (161, 96)}),
}


def layers(model: str) -> Iterator[Case]:
    """Every quantity on every MLP matrix of a model."""
    B, T, bias, matrices = MODELS[model]
    for matrix, (I, O) in matrices.items():
        name = f"{model} {matrix}"

        def case(
            quantity: str, per_token: bool = False, name=name, I=I, O=O, Q: int = 0, K: int = 0
        ) -> Case:
            sizes = Shape(B=Q if quantity == "queries" else B, T=T, I=I, O=O, Q=Q, K=K, bias=bias)
            return Case(name, quantity, sizes, per_token)

        yield Case(name, "covariance", Shape(B=B, T=T, I=I, bias=bias))
        yield from (case(op) for op in ("eigenvalues", "precondition", "self_influence"))
        yield case("queries", Q=8, K=min(32, I, O))
        for per_token in (False, True):
            yield case("dense_scores", per_token, Q=8)
            yield case("low_rank_scores", per_token, Q=32, K=min(32, I, O))


def _case(quantity: str, I: int, O: int, T: int, Q: int = 0, K: int = 0) -> Case:
    return Case("", quantity, Shape(B=8, T=T, I=I, O=O, Q=Q, K=K))


_SHORT = _case("eigenvalues", 768, 3072, 128)
_LONG = _case("eigenvalues", 768, 3072, 512)
_SELF = _case("self_influence", 1024, 3584, 256)
_QUERIES = _case("queries", 768, 3072, 128, Q=8, K=32)
_COVARIANCE = Case("", "covariance", Shape(B=4096, I=3072))
_SCORES = _case("low_rank_scores", 768, 3072, 512, Q=32, K=32)

ACCEPTANCE = (
    Requirement(_SHORT, "float32", "kronfluence order", 5.5),
    Requirement(_LONG, "float32", "kronfluence order", 1.5),
    Requirement(_LONG, "float32", "GEMM roof", 0.85),
    Requirement(_SELF, "float32", "kronfluence order", 7.0),
    Requirement(_QUERIES, "float32", "svd_lowrank", 5.0),
    Requirement(_QUERIES, "float32", "full SVD", 12.0),
    Requirement(_COVARIANCE, "float32", "kronfluence order", 1.6),
    Requirement(_SCORES, "float32", "kronfluence order", 1.2),
    Requirement(_SCORES, "float32", "GEMM roof", 0.85),
    *(
        Requirement(case, "bfloat16", "own fp32", 1.8)
        for case in (_SHORT, _LONG, _SELF, _QUERIES, _COVARIANCE, _SCORES)
    ),
)
