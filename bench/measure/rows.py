"""One measured row, and its one line of JSON, whoever measured it."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

# The way that every row has, and the product that an op's row is timed beside.
OURS, GEMM = "ours", "GEMM"


@dataclass(frozen=True)
class Row:
    """What was measured once: one quantity of one case, done in several ways in turn.

    seconds      by way, the median of `samples`; with `host_seconds` what the host spends on a call
    extra_bytes  by way, memory at the peak beyond what was there before the call
    failed       by way, why it could not run
    error        largest relative difference between ours and another way, of results that were
                 compared on what is timed; of low-rank queries the energy that ours lacks
    flops, bytes the least that the quantity takes
    roofs        "flops_per_second" and "bytes_per_second" of the machine in the same minutes
    details      what only this bench knows: arguments, other checks
    """

    bench: str  # "ops", "stages", "against_kronfluence" or "roofs"
    name: str  # of the layer, model or case
    quantity: str  # an op's stem, a stage
    shape: dict[str, int | bool] = field(default_factory=dict)
    dtype: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    host_seconds: dict[str, float] = field(default_factory=dict)
    extra_bytes: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    error: float | None = None
    flops: int | None = None
    bytes: int | None = None
    roofs: dict[str, float] = field(default_factory=dict)
    details: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)

    @property
    def ours(self) -> float:
        """Seconds of ours."""
        return self.seconds[OURS]

    @property
    def flop_rate(self) -> float:
        """FLOPs a second of ours, of those that are needed."""
        return self.flops / self.ours

    @property
    def gemm_share(self) -> float:
        """Of the machine's own product, the rate that ours reaches."""
        return self.flop_rate / self.roofs["flops_per_second"]

    def times(self, way: str) -> float:
        """Speed over another way; 0 if that did not run."""
        return self.seconds[way] / self.ours if way in self.seconds else 0.0

    def over(self, way: str) -> float:
        """Time of ours, in times of another way."""
        return self.ours / self.seconds[way]

    @property
    def machine(self) -> str:
        """What it was measured on."""
        facts = self.environment
        return facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file of JSON lines, which is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def read(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        ValueError: a line is not one of them.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows.append(Row(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not a measured row: {error}") from error
    return rows


def latest(rows: list[Row], *also: str) -> list[Row]:
    """Of rows that measured the same, equal in `also` too, the last, in the order of the first."""
    keys = ("bench", "name", "quantity", "shape", "dtype", *also)
    return list({tuple(str(getattr(row, key)) for key in keys): row for row in rows}.values())
