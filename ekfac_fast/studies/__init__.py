"""The paper's experiments, on any model: what influences say about how it generalises."""

from typing import TYPE_CHECKING

from ..lazy import loader

if TYPE_CHECKING:
    from .corpus import write_corpus
    from .ordering import word_order

__all__ = ["word_order", "write_corpus"]

__getattr__ = loader(__name__, {"word_order": "ordering", "write_corpus": "corpus"})
