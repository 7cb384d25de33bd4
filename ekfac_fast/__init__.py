"""ekfac_fast: the fast engine of EK-FAC influence functions for language models.

factors = fit(model, dataset, out="factors")
queries = prepare_queries(model, factors, questions)
scores = score(model, queries, dataset, out="scores")
scores.top(0, 10)
"""

__version__ = "0.1.0"

from . import ops
from .errors import Error, Notice
from .model.tasks import LanguageModelTask, Task
from .stages.factors import Factors, LayerFactors
from .stages.fit import fit
from .stages.queries import Queries, prepare_queries
from .stages.scan import score, self_scores
from .stages.scores import Scores

__all__ = [
    "Error",
    "Factors",
    "LanguageModelTask",
    "LayerFactors",
    "Notice",
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
