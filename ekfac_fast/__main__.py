"""`python -m ekfac_fast`: the same as the `ekfac-fast` command."""

from .cli import app

if __name__ == "__main__":
    app(prog_name="python -m ekfac_fast")
