"""Examples of which each was made of one record."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from .records import Records
from .tokens import column_of


@dataclass(frozen=True, eq=False)
class Recorded(Dataset):
    """An example a record, all of which know where they were read."""

    records: Records

    def __len__(self) -> int:
        return len(self.records)

    def column(self, name: str) -> list[Any]:
        """What the record of every example has in a column that was kept."""
        return column_of(self.records, range(len(self)), name)

    def record(self, index: int) -> Mapping[str, Any]:
        """What an example was made of."""
        return self.records[index]

    def source(self, index: int) -> str:
        """Where an example was read."""
        return self.records.source(index)
