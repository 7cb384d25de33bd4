"""ekfac_fast: the fast engine of EK-FAC influence functions for language models.

factors = fit(model, dataset, out="factors")
queries = prepare_queries(model, factors, questions)
scores = score(model, queries, dataset, out="scores")
scores.top(0, 10)
"""

__version__ = "0.1.0"

from typing import TYPE_CHECKING

from .errors import Error, Notice
from .lazy import loader

if TYPE_CHECKING:
    from . import data, ops, validation
    from .model.tasks import LanguageModelTask, Task
    from .stages.attribution import attribute_tokens
    from .stages.export import export_factors
    from .stages.factors import Factors, LayerFactors
    from .stages.fit import fit
    from .stages.preparation import prepare_queries
    from .stages.queries import Queries
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
    "attribute_tokens",
    "data",
    "export_factors",
    "fit",
    "ops",
    "prepare_queries",
    "score",
    "self_scores",
    "validation",
]

__getattr__ = loader(
    __name__,
    {
        "Factors": "stages.factors",
        "LanguageModelTask": "model.tasks",
        "LayerFactors": "stages.factors",
        "Queries": "stages.queries",
        "Scores": "stages.scores",
        "Task": "model.tasks",
        "attribute_tokens": "stages.attribution",
        "export_factors": "stages.export",
        "fit": "stages.fit",
        "prepare_queries": "stages.preparation",
        "score": "stages.scan",
        "self_scores": "stages.scan",
    },
    rooms=("data", "ops", "validation"),
)


def __dir__() -> list[str]:
    return __all__
