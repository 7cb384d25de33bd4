"""Real text that lies on many machines, as one corpus of five kinds.

definition   dict-foldoc     a computing term and what it is
fact         dict-elements   chemical elements
quotation    fortunes        sayings
manual       debian-faq, and Python's language reference
code         Python's standard library

The first four are packages of Debian, installed or unpacked (`dpkg -x`) under a root folder; what
is not there is left out.
"""

import gzip
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ..checks import path, whole
from ..errors import DataError
from ..store.files import replacing

# Characters of a record: about a hundred tokens.
LEAST, MOST = 120, 480
SHARE = "usr/share"
MODULES = ("heapq", "bisect", "shutil", "textwrap", "random", "statistics", "fractions", "queue",
           "difflib", "csv", "tempfile", "zipfile", "configparser", "calendar")  # fmt: skip


def write_corpus(file: str | Path, root: str | Path = "/", each: int = 240, seed: int = 0) -> Path:
    """Write `each` records of every kind, {"text", "kind"}, drawn and shuffled by `seed`.

    Raises:
        DataError: none of Debian's packages is under `root`.
    """
    file, root = path("file", file), path("root", root)
    whole("each", each)
    whole("seed", seed, 0)
    kinds = {
        "definition": _entries(root / SHARE / "dictd/foldoc.dict.dz", r"\n(?=\S)"),
        "fact": _entries(root / SHARE / "dictd/elements.dict.dz", r"\n(?=\S+\nSymbol:)"),
        "quotation": _quotations(root / SHARE / "games/fortunes"),
        "manual": _manual(root / SHARE / "doc/debian/FAQ/debian-faq.en.txt.gz"),
        "code": _code(),
    }
    found = {kind: _few([*dict.fromkeys(texts)], each, seed) for kind, texts in kinds.items()}
    if not any(found[kind] for kind in ("definition", "fact", "quotation")):
        raise DataError(
            f"{root}: no text of Debian's packages under {root / SHARE}: install dict-foldoc, "
            "dict-elements, fortunes and debian-faq, or unpack them there with dpkg -x"
        )
    rows = [{"text": text, "kind": kind} for kind, texts in found.items() for text in texts]
    random.Random(seed).shuffle(rows)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with replacing(file, len(lines)) as partial:
        partial.write_text(lines, encoding="utf-8")
    return file


def _few(texts: list[str], count: int, seed: int) -> list[str]:
    """Some of them."""
    return random.Random(seed).sample(texts, min(count, len(texts)))


def _fitting(blocks: Iterator[str] | list[str]) -> Iterator[str]:
    """Blocks one after the other, until they are long enough for a record."""
    held = ""
    for block in map(str.strip, blocks):
        if held and len(held) + len(block) + 2 > MOST:
            if len(held) >= LEAST:
                yield held
            held = ""
        held = f"{held}\n\n{block}" if held else block if len(block) <= MOST else ""
    if len(held) >= LEAST:
        yield held


def _entries(file: Path, between: str) -> Iterator[str]:
    """Entries of a dictionary, whole ones alone."""
    if file.is_file():
        for entry in re.split(between, gzip.decompress(file.read_bytes()).decode(errors="ignore")):
            text = re.sub(r"[{}]", "", entry).strip()
            if LEAST <= len(text) <= MOST and not text.startswith("00-database"):
                yield text


def _quotations(folder: Path) -> Iterator[str]:
    """Sayings of the better kind of file."""
    for name in ("wisdom", "work", "science", "people", "education", "love", "law", "goedel"):
        if (folder / name).is_file():
            said = (folder / name).read_text(encoding="utf-8", errors="ignore")
            yield from _fitting(said.split("\n%\n"))


def _manual(file: Path) -> Iterator[str]:
    """Paragraphs of Debian's questions and answers, and of Python's reference."""
    from pydoc_data.topics import topics

    if file.is_file():
        answers = gzip.decompress(file.read_bytes()).decode().partition("\nChapter 1.")[2]
        yield from _fitting(re.sub(r"\n +", "\n", answers).split("\n\n"))
    for name in sorted(topics):
        yield from _fitting(topics[name].split("\n\n"))


def _code() -> Iterator[str]:
    """Functions of Python's standard library."""
    for name in MODULES:
        source = Path(sysconfig.get_path("stdlib"), f"{name}.py")
        if source.is_file():
            yield from _fitting(re.split(r"\n(?=def |class |    def )", source.read_text("utf-8")))
