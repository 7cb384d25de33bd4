"""Peers in virtual environments of their own, which see our torch and transformers behind theirs.

`<peer>.txt` here pins the peer, in its first requirement, and what it needs that we do not have.
pip resolves nothing: whatever asks for torch would be given another one.
"""

import signal
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

PINS = Path(__file__).parent


class Failed(Exception):
    """A command that ended with an error: its last line; `told` is all that it said."""

    def __init__(self, reason: str, told: str = "") -> None:
        super().__init__(reason)
        self.told = told


def said(command: list[str], **options) -> str:
    """What a command writes to stdout.

    Raises:
        Failed: it ended with an error or by a signal.
    """
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if not done.returncode:
        return done.stdout
    told = [line for line in done.stderr.splitlines() if line.strip()]
    reason = told[-1].strip() if told else f"ended with {done.returncode}"
    if done.returncode < 0:
        reason = f"ended by {signal.Signals(-done.returncode).name}"
    raise Failed(reason, done.stderr)


def version(peer: str) -> str:
    """The pinned version of a peer."""
    lines = (PINS / f"{peer}.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if "==" in line)


def python(peer: str, folder: Path) -> str:
    """The interpreter of `folder/<peer>`, made anew if it is not there or was made of other pins.

    Raises:
        Failed: it cannot be made, or a pin not be installed; says pip's last line.
    """
    home, pins = (folder / peer).resolve(), PINS / f"{peer}.txt"
    interpreter, made = str(home / "bin" / "python"), home / "made"
    ours = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    wanted = pins.read_text() + ours
    if made.exists() and made.read_text() == wanted:
        return interpreter
    try:
        venv.create(home, clear=True, symlinks=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Failed(f"no virtual environment: {error}") from error
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", interpreter]
    said([*pip, "install", "--quiet", "--no-deps", "-r", str(pins)])
    packages = sysconfig.get_path("purelib", "venv", {"base": str(home)})
    Path(packages, "ours.pth").write_text(ours)
    made.write_text(wanted)
    return interpreter
