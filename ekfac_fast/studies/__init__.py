"""The paper's experiments, on any model: what influences say about how it generalises."""

from typing import TYPE_CHECKING

from ..lazy import loader

if TYPE_CHECKING:
    from .corpus import write_corpus
    from .depth import layers
    from .every import all_studies
    from .ordering import word_order
    from .parallel import languages
    from .plants import planted
    from .recall import memorisation
    from .sizes import scale
    from .tails import tail

__all__ = [
    "all_studies",
    "languages",
    "layers",
    "memorisation",
    "planted",
    "scale",
    "tail",
    "word_order",
    "write_corpus",
]

# A study's module is named otherwise than the study: both are names of this package.
__getattr__ = loader(
    __name__,
    {
        "all_studies": "every",
        "languages": "parallel",
        "layers": "depth",
        "memorisation": "recall",
        "planted": "plants",
        "scale": "sizes",
        "tail": "tails",
        "word_order": "ordering",
        "write_corpus": "corpus",
    },
)
