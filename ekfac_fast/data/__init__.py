"""Files of text, records and data sets, as batches of tokens."""

from typing import TYPE_CHECKING

from ..errors import DataError
from ..lazy import loader

if TYPE_CHECKING:
    from .mapped import MappedTokens
    from .records import read
    from .token_files import open_tokens
    from .tokens import Tokens, read_queries, tokenize

__all__ = [
    "DataError",
    "MappedTokens",
    "Tokens",
    "open_tokens",
    "read",
    "read_queries",
    "tokenize",
]

__getattr__ = loader(
    __name__,
    {
        "MappedTokens": "mapped",
        "Tokens": "tokens",
        "open_tokens": "token_files",
        "read": "records",
        "read_queries": "tokens",
        "tokenize": "tokens",
    },
)
