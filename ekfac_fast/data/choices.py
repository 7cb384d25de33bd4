"""What a user may choose by a word: how text becomes sequences, and what is asked of queries."""

from typing import Literal

# A record of a .txt file is all of it, a paragraph or a line.
Split = Literal["file", "paragraph", "line"]
# What becomes of a record of more tokens than a sequence has.
OnLong = Literal["chunk", "truncate", "refuse"]
# What becomes of an example of more tokens than the model has positions.
OnLongExample = Literal["truncate", "refuse"]
# What is measured of a query's label or pair.
Measure = Literal["loss", "margin"]
# What becomes of the measurements of a set of queries.
Reduce = Literal["sum", "mean"]
