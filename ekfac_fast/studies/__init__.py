"""The paper's experiments, on any model: what influences say about how it generalises."""

from typing import TYPE_CHECKING

from ..lazy import loader

if TYPE_CHECKING:
    from .corpus import write_corpus
    from .depth import layers
    from .ordering import word_order
    from .tails import tail

__all__ = ["layers", "tail", "word_order", "write_corpus"]

__getattr__ = loader(
    __name__,
    {
        "layers": "depth",
        "tail": "tails",
        "word_order": "ordering",
        "write_corpus": "corpus",
    },
)
