"""Files of text, records and data sets, as batches of tokens."""

from typing import TYPE_CHECKING

from ..errors import DataError
from ..lazy import loader

if TYPE_CHECKING:
    from .records import read
    from .tokens import Tokens, read_queries, tokenize

__all__ = ["DataError", "Tokens", "read", "read_queries", "tokenize"]

__getattr__ = loader(
    __name__,
    {"Tokens": "tokens", "read": "records", "read_queries": "tokens", "tokenize": "tokens"},
)
