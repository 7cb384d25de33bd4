"""The tables of docs/models.md, from the rows of families.py."""

import re
from pathlib import Path
from typing import Any

from .markdown import table

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
PARTS = ("default", "named", "all")
# A refusal, by words of its message; the page explains them.
REFUSALS = {
    "experts in one tensor": "fused experts",
    "name of an MLP's": "no MLP",
    "it is bidirectional": "bidirectional",
    "own backward pass": "own backward pass",
    "did not run": "does not run",
    "switched gradients off": "without gradients",
    "not the product alone": "a tuple",
    "does not compute W x + b": "another product",
    "which of them are padding cannot be told": "other rows",
    "shares a parameter": "tied",
}


def refusal(message: str) -> str:
    """A refusal in two words."""
    return next((short for words, short in REFUSALS.items() if words in message), message)


def outcome(row: dict[str, Any]) -> str:
    """right, wrong, refused, failed or not built."""
    parts = [row[key] for key in PARTS if key in row]
    if "not_built" in row:
        return "not built"
    if any("failed" in part for part in parts):
        return "failed"
    if any(not part.get("right", True) for part in parts):
        return "wrong"
    return "right" if any("right" in part for part in parts[:2]) else "refused"


def _size(error: float) -> str:
    return f"{error:.0e}".replace("e-0", "e-")


def _last(kinds: list[str]) -> str:
    """The last words of layers' names."""
    return ", ".join(sorted({re.sub(r"^.*\.(?=\w+(\.\*)?$)", "", kind) for kind in kinds}))


def _other(part: dict[str, Any] | None) -> str:
    """Layers by name, or all of them, in one cell."""
    if part is None:
        return ""
    if "right" not in part:
        return refusal(part.get("refused") or part["failed"])
    worst = _size(max(part["factors"], part["scores"]))
    return f"{part['layers']} ({part['share']:.0%}): {worst}"


def _notes(row: dict[str, Any]) -> str:
    parts = [row[key] for key in PARTS if key in row]
    found = ["fp32"] if row["dtype"] == "float32" else []
    found += ["`shared_parameters=True`"] if any(part["shared"] for part in parts) else []
    found += ["`batch_tokens=1`"] if any(part["alone"] for part in parts) else []
    left = {name: refusal(why) for part in parts for name, why in part["left_out"].items()}
    for why in sorted({*left.values()}):
        found.append(f"{why}: {_last([name for name in left if left[name] == why])}")
    return "; ".join(found)


def line(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    default = row["default"]
    cells = [refusal(default.get("refused") or default.get("failed", "")), "", "", ""]
    if "right" in default:
        errors = [_size(default["factors"]), _size(default["scores"])]
        names = f"{default['layers']}: {_last(default['kinds'])}"
        cells = [names, f"{default['share']:.0%}", *errors]
    return [row["class"], *cells, _other(row.get("named")), _other(row["all"]), _notes(row)]


def tables(rows: list[dict[str, Any]]) -> dict[str, str]:
    """What stands between the marks of the page."""
    built = [row for row in rows if "not_built" not in row]
    others = ("refused", "wrong", "failed")
    count = {word: sum(outcome(row) == word for row in rows) for word in ("right", *others)}
    default = sum("right" in row["default"] for row in built)
    numbers = [len(rows), len(built), count["right"], default, *(count[word] for word in others)]
    head = ["class", "default layers", "share", "factors", "scores", "by name", "all", "notes"]
    missing = [
        [row["class"], " ".join(row["not_built"].split())[:160].replace("|", "\\|")]
        for row in rows
        if "not_built" in row
    ]
    return {
        "counts": table(
            ["classes", "built", "right", "of these by default", *others], [[*map(str, numbers)]]
        ),
        "families": table(head, [line(row) for row in built]),
        "not-built": table(["class", "why"], missing),
    }


def write(rows: list[dict[str, Any]]) -> None:
    """Write the marked tables of the page anew."""
    found = tables(rows)
    PAGE.write_text(MARKED.sub(lambda m: f"{m[1]}\n{found[m[2]]}\n\n{m[3]}", PAGE.read_text()))
