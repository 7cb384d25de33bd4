"""Files of text, records and data sets, as batches of tokens."""

from ..errors import DataError
from .records import read
from .tokens import Tokens, read_queries, tokenize

__all__ = ["DataError", "Tokens", "read", "read_queries", "tokenize"]
