"""Shapes that benches time: the MLP matrices of four models, and the acceptance tables."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ekfac_fast.ops.shapes import Shape


@dataclass(frozen=True)
class Case:
    """One row: a quantity (an op's stem, or "queries") on one shape.

    `rotated`: g and a are in the eigenbasis already, so the gradient tile is all there is.
    """

    name: str
    quantity: str
    shape: Shape
    per_token: bool = False
    rotated: bool = False

    @property
    def label(self) -> str:
        """What the row is called."""
        s = self.shape
        sizes = f"{s.I} x {s.O}" if s.O > 1 else f"F={s.I}"
        parts = [self.quantity, "per token" * self.per_token, "rotated" * self.rotated]
        parts += [self.name, sizes]
        parts.append(f"B={s.B} T={s.T}" if s.O > 1 else f"N={s.N}")
        parts += [f"Q={s.Q}"] * (s.Q > 0 and s.O > 1) + [f"K={s.K}"] * (s.K > 0)
        return " ".join(part for part in parts if part)


# What a row may be measured against besides other candidates: the rate of the machine's GEMM, and
# the bytes of all gradients of the batch, of which an op may take a share beyond its inputs.
ROOF, GRADIENTS = "GEMM roof", "memory of all gradients"


@dataclass(frozen=True)
class Requirement:
    """One number of an acceptance table: at least `ratio` times `against`, of GRADIENTS at most."""

    case: Case
    dtype: str
    against: str  # a candidate of the row, ROOF or GRADIENTS
    ratio: float

    def met(self, got: float) -> bool:
        """Whether `got` is enough."""
        return got <= self.ratio if self.against == GRADIENTS else got >= self.ratio


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
        yield Case(name, "covariance", Shape(B=B, T=T, I=I, bias=bias))
        layer = Shape(B=B, T=T, I=I, O=O, bias=bias)
        for quantity in ("eigenvalues", "precondition", "self_influence"):
            yield Case(name, quantity, layer)
        K = min(32, I, O)
        yield Case(name, "queries", replace(layer, B=8, Q=8, K=K))
        for per_token in (False, True):
            yield Case(name, "dense_scores", replace(layer, Q=8), per_token)
            yield Case(name, "low_rank_scores", replace(layer, Q=32, K=K), per_token)


def _case(
    quantity: str, I: int, O: int, T: int, Q: int = 0, K: int = 0, B: int = 8, rotated: bool = False
) -> Case:
    return Case("", quantity, Shape(B=B, T=T, I=I, O=O, Q=Q, K=K), rotated=rotated)


_SHORT = _case("eigenvalues", 768, 3072, 128)
_LONG = _case("eigenvalues", 768, 3072, 512)
_SELF = _case("self_influence", 1024, 3584, 256)
_QUERIES = _case("queries", 768, 3072, 128, Q=8, K=32)
_COVARIANCE = Case("", "covariance", Shape(B=4096, I=3072))
_SCORES = _case("low_rank_scores", 768, 3072, 512, Q=32, K=32)

_CPU = (
    Requirement(_SHORT, "float32", "kronfluence order", 5.5),
    Requirement(_LONG, "float32", "kronfluence order", 1.5),
    Requirement(_LONG, "float32", ROOF, 0.85),
    Requirement(_SELF, "float32", "kronfluence order", 7.0),
    Requirement(_QUERIES, "float32", "svd_lowrank", 5.0),
    Requirement(_QUERIES, "float32", "full SVD", 12.0),
    Requirement(_COVARIANCE, "float32", "kronfluence order", 1.6),
    Requirement(_SCORES, "float32", "kronfluence order", 1.2),
    Requirement(_SCORES, "float32", ROOF, 0.85),
    *(
        Requirement(case, "bfloat16", "own fp32", 1.8)
        for case in (_SHORT, _LONG, _SELF, _QUERIES, _COVARIANCE, _SCORES)
    ),
)

_TILES = tuple(
    _case(quantity, 4096, O, 512, B=B, rotated=True)
    for O in (14336, 4096)
    for B in (8, 32)
    for quantity in ("eigenvalues", "self_influence")
)
_LLAMA_ORDER = _case("eigenvalues", 4096, 14336, 512)
_LLAMA_SCORES = _case("low_rank_scores", 4096, 14336, 512, Q=64, K=32)
_GPT2_SCORES = _case("low_rank_scores", 768, 3072, 512, Q=64, K=32)
_NARROW = tuple(
    _case("self_influence", I, O, 512, B=B)
    for I, O, B in ((128, 128, 32), (256, 256, 8), (256, 512, 8))
)
_DENSE = _case("dense_scores", 4096, 14336, 512, Q=8)

_CUDA = (
    *(Requirement(case, "bfloat16", ROOF, 0.75) for case in _TILES),
    *(Requirement(case, "bfloat16", "bare bmm", 1.0) for case in _TILES),
    *(
        Requirement(Case("", "covariance", Shape(B=16384, I=I)), "bfloat16", "addmm", 1.6)
        for I in (4096, 14336)
    ),
    Requirement(_LLAMA_SCORES, "bfloat16", "GEMMs + reduction", 0.95),
    Requirement(_GPT2_SCORES, "bfloat16", "GEMMs + reduction", 1.5),
    Requirement(_LLAMA_ORDER, "bfloat16", "kronfluence order", 7.0),
    *(Requirement(case, "bfloat16", "three launches", 1.0) for case in _NARROW),
    *(
        Requirement(case, "bfloat16", GRADIENTS, 0.05)
        for case in (*_TILES, _LLAMA_ORDER, _LLAMA_SCORES, _GPT2_SCORES)
    ),
    Requirement(_DENSE, "bfloat16", GRADIENTS, 0.3),  # strips of 256 MiB
)

# Of the whole scan, `stages.py` holds the one about Llama-3-8B.
ACCEPTANCE = {"cpu": _CPU, "cuda": _CUDA}
