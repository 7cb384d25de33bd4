"""What is printed: never markup, never a control sequence, whatever text and names hold."""

from typing import Any

from rich.console import Console


def harmless(text: str) -> str:
    """Text with a visible name for every character that would move, hide or colour something."""
    from ..report.text import pieces  # not for --help: its room needs numpy

    lines = text.split("\n")
    return "\n".join("".join(pieces(line)) if line else "" for line in lines)


class Terminal(Console):
    """A console that says what it is given."""

    def __init__(self) -> None:
        super().__init__(highlight=False)

    def say(self, text: str = "", *, style: str = "", **more: Any) -> None:
        """Print text as it is."""
        self.print(harmless(text), style=style, markup=False, soft_wrap=True, **more)
