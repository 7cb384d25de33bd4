"""How tables and times look in Markdown."""


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    every = [head, ["---"] * len(head), *lines]
    return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in x) for x in every)


def cell(text: str, most: int = 160) -> str:
    """Any text as what one cell holds: one line, no bars, cut where it is longer than `most`."""
    text = " ".join(text.split())
    return (text if len(text) <= most else f"{text[: most - 3]}...").replace("|", "\\|")


def duration(seconds: float) -> str:
    """Three digits, or four below ten seconds, and a unit."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 0.1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e3:.0f} ms" if seconds < 9.9995 else f"{seconds:.1f} s"
