"""One record, checked: a text, a prompt and its completion, or a conversation.

    {"text"}    {"prompt", "completion"}    {"messages": [{"role", "content"}, ...]}

A prompt and a completion may both be messages; `conversations` with `from` and `value` are messages
too. Beside them a record keeps `source`, where it was read, `name`, and a conversation's `tools`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checks import listed, require, shown
from ..errors import DataError

KINDS = (("text",), ("messages",), ("conversations",), ("prompt", "completion"))
# A conversation of one question, put together of fields.
TURNS = ("system", "user", "assistant")
SPEAKERS = {"human": "user", "gpt": "assistant"}
BESIDE = ("name", "tools")


@dataclass(frozen=True)
class Columns:
    """Which fields of a file make a record: those of the usual names, or as `fields` maps them.

    fields  {"prompt": "question", "completion": "answer"}: our names, theirs; "a+b" is both,
            a blank line between them. {"user": ..., "assistant": ...} make a conversation.
    texts   whether a record may be a text alone; a query may not
    keep    further fields, kept in `columns` as they are: a source, a data set, a date
    """

    fields: Mapping[str, str] | None = None
    texts: bool = True
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = self.fields
        if given is None:
            return
        require(
            isinstance(given, Mapping)
            and all(isinstance(x, str) and x for x in (*given.keys(), *given.values()))
            and _complete(set(given)),
            "fields",
            given,
            "a mapping of 'text', of 'messages', of 'prompt' and 'completion', or of 'user' and "
            "'assistant' (and 'system') to a file's own names",
        )

    def among(self, present: Sequence[str], source: str) -> dict[str, list[str]]:
        """Our names to those of the file that hold them."""
        if self.fields is None:
            kinds = KINDS if self.texts else KINDS[1:]
            names = next((kind for kind in kinds if set(kind) <= set(present)), None)
            found = {name: [name] for name in names or ()}
        else:
            found = {
                ours: [theirs] if theirs in present else theirs.split("+")
                for ours, theirs in self.fields.items()
            }
        if not found or not {part for parts in found.values() for part in parts} <= set(present):
            raise DataError(
                f"{source}: needs {self._wanted()}; it has "
                f"{', '.join(map(repr, present)) or 'nothing'}"
            )
        return found

    def record(self, value: Any, source: str) -> dict[str, Any]:
        """A record from a mapping. Raises DataError."""
        _mapping(value, source)
        names = self.among(list(value), source)
        held = value.get("against") if "completion" in names else None
        if held and "against" not in {*names, *self.keep}:
            raise DataError(
                f"{source}: has 'against', another completion that its own is held against: that "
                "is a query, which `read_queries` reads (of a file, or of a list of records)"
            )
        found = {
            ours: _joined([value[part] for part in parts], parts, source)
            for ours, parts in names.items()
        }
        kept = self.kept(value, source)
        if "user" in found:
            said = ((role, text_of(found[role], role, source)) for role in TURNS if role in found)
            turns = [{"role": x, "content": y} for x, y in said if y or x != "system"]
            return {"messages": turns, **kept}
        talk = found.keys() & {"messages", "conversations"} or isinstance(found.get("prompt"), list)
        if not talk:
            return {**{name: text_of(x, name, source) for name, x in found.items()}, **kept}
        found = {
            "messages" if name == "conversations" else name: _turns(turns, name, source)
            for name, turns in found.items()
        }
        if value.get("tools"):
            kept["tools"] = _tools(value["tools"], source)
        return {**found, **kept}

    def kept(self, value: Mapping[str, Any], source: str) -> dict[str, Any]:
        """What a record has beside what it says."""
        found: dict[str, Any] = {"source": source}
        if self.keep:
            if absent := [name for name in self.keep if name not in value]:
                raise DataError(
                    f"{source}: has no {absent[0]!r} to keep; it has {listed([*value])}"
                )
            found["columns"] = {name: value[name] for name in self.keep}
        if value.get("name") is not None:
            found["name"] = str(value["name"])
        return found

    def _wanted(self) -> str:
        if self.fields is None:
            return ("'text', " if self.texts else "") + "'messages', or 'prompt' and 'completion'"
        return listed([repr(theirs) for theirs in self.fields.values()])


@dataclass(frozen=True)
class Named(Columns):
    """Fields of these names, or as `fields` maps them: all of `wanted`, and those of `more` that a
    record has; none that is `foreign`, which makes it a record of another kind. Values stay as
    they are, for whoever asked for them to check.
    """

    texts: bool = False
    wanted: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given, known = self.fields, (*self.wanted, *self.more)
        if given is None:
            return
        right = isinstance(given, Mapping) and {*given} <= {*known}
        right = right and all(isinstance(x, str) and x for x in given.values())
        names = " and ".join(map(repr, known))
        require(right, "fields", given, f"a mapping of {names} to a file's own names")

    def among(self, present: Sequence[str], source: str) -> dict[str, list[str]]:
        """Our names to those of the file that hold them."""
        theirs = {ours: (self.fields or {}).get(ours, ours) for ours in (*self.wanted, *self.more)}
        if absent := [theirs[ours] for ours in self.wanted if theirs[ours] not in present]:
            raise DataError(
                f"{source}: has no {absent[0]!r}, needs {listed([repr(x) for x in self.wanted])}; "
                f"it has {', '.join(map(repr, present)) or 'nothing'}"
            )
        if mixed := [name for name in self.foreign if name in present]:
            raise DataError(
                f"{source}: has {mixed[0]!r}, records before it have none: records of two kinds "
                "are for files of their own"
            )
        return {ours: [name] for ours, name in theirs.items() if name in present}

    def record(self, value: Any, source: str) -> dict[str, Any]:
        """A record from a mapping. Raises DataError."""
        _mapping(value, source)
        names = self.among(list(value), source)
        found = {ours: value[theirs] for ours, (theirs,) in names.items()}
        if value.get("tools"):
            found["tools"] = value["tools"]
        return {**found, **self.kept(value, source)}


def _mapping(value: Any, source: str) -> None:
    """DataError unless a record is one."""
    if not isinstance(value, Mapping):
        raise DataError(f"{source}: holds a {type(value).__name__}, not an object with fields")


def _complete(names: set[str]) -> bool:
    """Whether these of our names make a record."""
    return names - {"system"} == {"user", "assistant"} or tuple(sorted(names)) in {
        tuple(sorted(kind)) for kind in KINDS
    }


def _joined(values: list[Any], names: list[str], source: str) -> Any:
    """A field as it is, or several texts with blank lines between them; empty ones are left out."""
    if len(values) == 1:
        return values[0]
    texts = (
        text_of(x, name, source) for x, name in zip(values, names, strict=True) if x is not None
    )
    return "\n\n".join(filter(None, texts))


def text_of(value: Any, name: str, source: str) -> str:
    """A string of whole characters."""
    if not isinstance(value, str):
        raise DataError(f"{source}: {name!r} is a {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{source}: {name!r} holds half of a character at position {error.start} (a lone "
            "surrogate, as of an emoji that was cut in two)"
        ) from error
    return value


def _turns(value: Any, name: str, source: str) -> list[dict[str, Any]]:
    """Messages with a role; their content is text, parts, or nothing beside calls of tools."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{source}: {name!r} is not a list of messages")
    turns = []
    for number, turn in enumerate(value, 1):
        where = f"turn {number} of {name}"
        if not isinstance(turn, Mapping):
            raise DataError(f"{source}: {where} is a {type(turn).__name__}, not a message")
        if "from" in turn and "value" in turn:
            speaker = text_of(turn["from"], f"{where}, from", source)
            turn = {"role": SPEAKERS.get(speaker, speaker), "content": turn["value"]}
        if not isinstance(turn.get("role"), str):
            raise DataError(f"{source}: {where} has no 'role'")
        said = turn.get("content")
        if said is None and not turn.get("tool_calls"):
            raise DataError(f"{source}: {where} has no 'content'")
        if isinstance(said, list):
            # As text: templates for text alone would print the list.
            turn = {**turn, "content": _parts(said, where, source)}
        elif said is not None:
            text_of(said, f"{where}, content", source)
        _whole(turn, where, source)
        turns.append(dict(turn))
    return turns


def _parts(said: list[Any], where: str, source: str) -> str:
    """The text of a content that comes in parts."""
    for part in said:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise DataError(
                f"{source}: {where} has a part that is no text ({shown(part)}); leave the "
                "conversation out, or its images and sounds"
            )
    return "".join(part["text"] for part in said)


def _tools(value: Any, source: str) -> list[Any]:
    """Descriptions of tools, as chat templates want them."""
    if not isinstance(value, list) or not all(isinstance(x, Mapping) for x in value):
        raise DataError(f"{source}: 'tools' is not a list of objects")
    _whole(value, "tools", source)
    return value


def _whole(value: Any, name: str, source: str) -> None:
    """Every string in it consists of whole characters."""
    if isinstance(value, str):
        text_of(value, name, source)
    elif isinstance(value, Mapping):
        for key, x in value.items():
            _whole(key, name, source)
            _whole(x, name, source)
    elif isinstance(value, list):
        for x in value:
            _whole(x, name, source)
