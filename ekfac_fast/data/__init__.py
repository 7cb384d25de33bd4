"""Files of text, records and data sets, as batches of tokens."""

from typing import TYPE_CHECKING

from ..errors import DataError
from ..lazy import loader

if TYPE_CHECKING:
    from .labelled import Labelled, read_labelled
    from .mapped import MappedTokens
    from .packing import Packed, pack
    from .pairs import Pairs, read_pairs, read_queries
    from .records import read
    from .token_files import open_tokens
    from .tokens import Tokens, tokenize

__all__ = [
    "DataError",
    "Labelled",
    "MappedTokens",
    "Packed",
    "Pairs",
    "Tokens",
    "open_tokens",
    "pack",
    "read",
    "read_labelled",
    "read_pairs",
    "read_queries",
    "tokenize",
]

__getattr__ = loader(
    __name__,
    {
        "Labelled": "labelled",
        "MappedTokens": "mapped",
        "Packed": "packing",
        "Pairs": "pairs",
        "Tokens": "tokens",
        "open_tokens": "token_files",
        "pack": "packing",
        "read": "records",
        "read_labelled": "labelled",
        "read_pairs": "pairs",
        "read_queries": "pairs",
        "tokenize": "tokens",
    },
)
