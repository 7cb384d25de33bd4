"""A study's own files: JSON lines that come in, JSON lines and a drawing that go out."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checks import shown
from ..errors import DataError
from ..extras import optional
from ..store.files import replacing

SHIPPED = Path(__file__).parent / "data"
# A file of the same numbers is the same file.
SAME = {"svg.hashsalt": "ekfac_fast", "svg.fonttype": "none"}
# Told apart by the colour-blind, too; the first is the reference.
COLOURS = ("#0072b2", "#999999", "#e69f00", "#bbbbbb", "#d55e00", "#cc79a7", "#009e73", "#56b4e9")


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; each has `source`, its file and line.

    Raises:
        DataError: no such file, or a line is no object of texts and numbers; names it.
    """
    if not file.is_file():  # a pipe would be waited for
        raise DataError(f"{file}: no such file")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as text ({error})") from error
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        source = f"{file}, line {number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{source}: not JSON ({error})") from error
        if not isinstance(value, dict):
            raise DataError(f"{source}: is {shown(value)}, expected an object with fields")
        found.append({**value, "source": source})
    if not found:
        raise DataError(f"{file}: is empty")
    return found


def texts_of(line: Mapping[str, Any], *names: str) -> list[str]:
    """Fields of a line that are texts with something in them; DataError names one that is not."""
    for name in names:
        value = line.get(name)
        if not isinstance(value, str) or not value.strip():
            told = f"{name} is {shown(value)}" if name in line else f"has no {name!r}"
            raise DataError(f"{line['source']}: {told}, expected a text that is not empty")
    return [line[name] for name in names]


def is_question(line: Mapping[str, Any]) -> bool:
    """Whether a line asks (a prompt and its completion) and is no text that is asked about."""
    return "prompt" in line or "completion" in line


def write_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write JSON lines; numbers to six digits, and null for one that is not finite."""
    text = "".join(json.dumps(_short(row), ensure_ascii=False) + "\n" for row in rows)
    with replacing(file, len(text)) as partial:
        partial.write_text(text, encoding="utf-8")
    return file


def write_result(out: Path, name: str, result: Any) -> None:
    """`name`.jsonl and `name`.svg of what a study has found."""
    write_lines(out / f"{name}.jsonl", result.rows)
    result.draw(out / f"{name}.svg")


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _short(x) for name, x in value.items()}
    return [_short(x) for x in value] if isinstance(value, list | tuple) else value


@contextmanager
def drawing(file: Path, width: float, height: float) -> Iterator[Any]:
    """A figure of matplotlib's, in inches, that becomes an SVG file."""
    matplotlib = optional("matplotlib", "studies")
    # The file's text is no mathematics, whatever signs a query holds.
    with matplotlib.rc_context({**SAME, "font.size": 8, "text.parse_math": False}):
        figure = optional("matplotlib.figure", "studies").Figure((width, height))
        figure.set_layout_engine("constrained")
        yield figure
        with replacing(file, 1 << 20) as partial:
            figure.savefig(partial, format="svg", metadata={"Date": None})
