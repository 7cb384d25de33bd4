"""ekfac_fast: the fast engine of EK-FAC influence functions for language models."""

from . import ops

__version__ = "0.1.0"

__all__ = ["__version__", "ops"]
