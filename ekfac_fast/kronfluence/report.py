"""Which module took which path in which stage, and why."""

from dataclasses import dataclass

FAST, STOCK = "ekfac_fast", "kronfluence"


@dataclass(frozen=True)
class Row:
    """One module in one stage: the `path` it took last, and `why` where that was kronfluence's."""

    module: str
    kind: str
    stage: str
    path: str
    why: str


@dataclass(frozen=True)
class Report:
    """All rows since the process began, the latest for each module and stage; prints as a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        if not self.rows:
            return "ekfac_fast.kronfluence: no stage has run with the backend on"
        groups: dict[tuple[str, str, str, str], list[str]] = {}
        for row in self.rows:
            groups.setdefault((row.path, row.stage, row.kind, row.why), []).append(row.module)
        lines = ["path         stage                   modules"]
        for (path, stage, kind, why), modules in sorted(groups.items()):
            named = ", ".join(modules) if why else f"{modules[0]} .. {modules[-1]}"
            reason = f": {why}" if why else ""
            lines.append(f"{path:<13}{stage:<24}{len(modules)} {kind} ({named}){reason}")
        return "\n".join(lines)


_rows: dict[tuple[str, str], Row] = {}


def record(row: Row) -> None:
    """Note the path that a module takes in a stage."""
    _rows[row.module, row.stage] = row


def report() -> Report:
    """The rows recorded so far, in the order in which modules first met their stages."""
    return Report(tuple(_rows.values()))
