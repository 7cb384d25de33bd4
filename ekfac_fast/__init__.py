"""ekfac_fast: the fast engine of EK-FAC influence functions for language models.

factors = fit(model, dataset, out="factors")
queries = prepare_queries(model, factors, questions)
scores = score(model, queries, dataset, out="scores")
scores.top(0, 10)
"""

from . import ops
from .factors import Factors, LayerFactors, fit
from .queries import Queries, prepare_queries
from .scores import Scores
from .scoring import score, self_scores
from .tasks import LanguageModelTask, Task

__version__ = "0.1.0"

__all__ = [
    "Factors",
    "LanguageModelTask",
    "LayerFactors",
    "Queries",
    "Scores",
    "Task",
    "__version__",
    "fit",
    "ops",
    "prepare_queries",
    "score",
    "self_scores",
]
