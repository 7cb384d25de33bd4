"""How text becomes sequences: what a user may choose."""

from typing import Literal

# A record of a .txt file is all of it, a paragraph or a line.
Split = Literal["file", "paragraph", "line"]
# What becomes of a record of more tokens than a sequence has.
OnLong = Literal["chunk", "truncate", "refuse"]
# What becomes of an example of more tokens than the model has positions.
OnLongExample = Literal["truncate", "refuse"]
