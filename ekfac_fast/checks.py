"""What comes in from outside, checked where it does: arguments, and the values of JSON files.

A schema is a type (a number is finite, a bool is none), None, a `Whole`, a tuple of alternatives,
[schema] for a list, {str: schema} for any names, or {name: schema} for these.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from .errors import ArgumentError, DataError, StoreError


def shown(value: Any) -> str:
    """A value as it stands in a message."""
    try:
        text = repr(value)
    except Exception as error:
        text = f"a {type(value).__name__} ({error})"
    return text if len(text) <= 100 else text[:97] + "..."


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names as they stand in a message: the first, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def are_texts(values: Any) -> bool:
    """Whether it is a list of strings."""
    return isinstance(values, list | tuple) and all(isinstance(x, str) for x in values)


def require(right: bool, name: str, value: Any, expected: str) -> None:
    """ArgumentError unless an argument is right."""
    if not right:
        raise ArgumentError(f"{name} is {shown(value)}, expected {expected}")


@dataclass(frozen=True)
class Whole:
    """A whole number from `least` to `most`."""

    least: int = 0
    most: int = 2**63 - 1

    def holds(self, value: Any) -> bool:
        """Whether `value` is one."""
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        return whole and self.least <= value <= self.most

    def __str__(self) -> str:
        if self.most == 2**63 - 1:
            return f"a whole number of at least {self.least}"
        return f"a whole number from {self.least} to {self.most}"


def size(name: str, value: Any) -> int:
    """Bytes as an int; ArgumentError unless it is a whole number or such as "16GiB" or "500MB"."""
    expected = 'bytes, or a size such as "16GiB" or "500MB"'
    if isinstance(value, str):
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([KMGT]?)(i?)B?", value.strip())
        require(match is not None, name, value, expected)
        assert match is not None
        count, prefix, binary = match.groups()
        value = int(float(count) * (1024 if binary else 1000) ** " KMGT".index(prefix or " "))
    require(Whole(1).holds(value), name, value, expected)
    return int(value)


def whole(name: str, value: Any, least: int = 1, most: int = 2**63 - 1) -> int:
    """`value` as an int; ArgumentError unless it is a whole number in that range."""
    kind = Whole(least, most)
    require(kind.holds(value), name, value, str(kind))
    return int(value)


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False


def comparable(name: str, label: Any) -> Any:
    """A label as it can be told from others: of a tensor or an array its one value.

    Raises:
        ArgumentError: it cannot be compared, or is not equal to itself (NaN).
    """
    one = getattr(label, "item", None)
    if callable(one) and getattr(label, "ndim", 1) == 0:
        label = one()
    try:
        hash(label)
        told = bool(label == label) and not callable(getattr(label, "item", None))
    except (TypeError, ValueError, RuntimeError):
        told = False
    if not told:
        raise ArgumentError(
            f"{name}: the label {shown(label)} cannot be compared with others; give texts or "
            "numbers"
        )
    return label


def instance(name: str, value: Any, kind: type | tuple[type, ...], expected: str) -> None:
    """ArgumentError unless `value` is of a type."""
    require(isinstance(value, kind), name, value, expected)


def flag(name: str, value: Any) -> None:
    """ArgumentError unless `value` is True or False."""
    instance(name, value, bool, "True or False")


def choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """ArgumentError unless `value` is one of a few words."""
    known = isinstance(value, str) and value in allowed
    require(known, name, value, " or ".join(map(repr, allowed)))


def path(name: str, value: Any) -> Path:
    """`value` as a path; ArgumentError where it cannot be one."""
    right = isinstance(value, str | os.PathLike) and isinstance(os.fspath(value), str)
    try:
        right = right and bool(os.fspath(value)) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        right = False
    require(right, name, value, "a path")
    return Path(value)


def callback(name: str, value: Any) -> None:
    """ArgumentError unless `value` is None or can be called."""
    require(value is None or callable(value), name, value, "a function, or None")


def sized(dataset: Any) -> int:
    """The length of a data set; DataError where it is none."""
    kind = type(dataset).__name__
    if type(dataset).__module__.partition(".")[0] == "pandas":
        rows = ".to_dict('records')" if kind == "DataFrame" else ".tolist()"
        raise DataError(f"the data set is a pandas {kind}: give its rows, {rows}")
    indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not indexed or isinstance(dataset, type | str | bytes | Mapping):
        raise DataError(
            f"the data set is a {kind}, which cannot be indexed: give a list or a data set with "
            "__len__ and __getitem__ (of a DataLoader its .dataset, of a stream list(stream))"
        )
    try:
        return len(dataset)
    except TypeError as error:
        raise DataError(f"the data set is a {kind} without a length ({error})") from error


def place(index: Any, size: int) -> int:
    """An index of a data set, from its end if it is negative; ArgumentError for a slice."""
    if isinstance(index, slice):
        some = range(size)[index]
        raise ArgumentError(
            "examples are read one by one: of some of them torch.utils.data.Subset(data, "
            f"{some!r}) is a data set"
        )
    return range(size)[index]


def faults(value: Any, schema: Any, at: str = "") -> Iterator[str]:
    """What in a value is not as its schema says, by dotted names."""
    match schema:
        case tuple():
            found = [list(faults(value, one, at)) for one in schema]
            if all(found):
                yield from found[0]
        case dict() if isinstance(value, dict):
            for name in value if str in schema else schema:
                where = f"{at}.{name}" if at else str(name)
                if name not in value:
                    yield f"{where} is missing"
                else:
                    yield from faults(value[name], schema.get(name, schema.get(str)), where)
        case [one] if isinstance(value, list):
            for number, item in enumerate(value):
                yield from faults(item, one, f"{at}[{number}]")
        case _:
            right, expected = _simple(value, schema)
            if not right:
                yield f"{at or 'all of it'} is {shown(value)}, expected {expected}"


def _simple(value: Any, schema: Any) -> tuple[bool, str]:
    """Whether a value without parts is as its schema says, and what that is in words."""
    match schema:
        case None:
            return value is None, "null"
        case Whole():
            return schema.holds(value), str(schema)
        case dict():
            return False, "names and values"
        case list():
            return False, "a list"
    if schema is float:
        return is_number(value), "a finite number"
    return isinstance(value, schema), {str: "text", bool: "true or false"}.get(schema, "anything")


def check_json(value: Any, schema: Any, file: Path, advice: str) -> None:
    """StoreError that names the file and its first fault."""
    for fault in faults(value, schema):
        raise StoreError(f"{file}: {fault}. {advice}")
