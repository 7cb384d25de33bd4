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
    from .model.classification import SequenceClassificationTask, TokenClassificationTask
    from .model.preferences import PreferenceTask, RewardTask
    from .model.tasks import LanguageModelTask, Task
    from .report.written import write_report
    from .stages.attribution import attribute_tokens
    from .stages.export import export_factors
    from .stages.factors import Factors, LayerFactors
    from .stages.fit import fit
    from .stages.loop import capture
    from .stages.preparation import prepare_queries
    from .stages.queries import Queries
    from .stages.references import referenced
    from .stages.scan import score, self_scores
    from .stages.scores import Scores
    from .stages.trainer import CaptureCallback

__all__ = [
    "CaptureCallback",
    "Error",
    "Factors",
    "LanguageModelTask",
    "LayerFactors",
    "Notice",
    "PreferenceTask",
    "Queries",
    "RewardTask",
    "Scores",
    "SequenceClassificationTask",
    "Task",
    "TokenClassificationTask",
    "__version__",
    "attribute_tokens",
    "capture",
    "data",
    "export_factors",
    "fit",
    "ops",
    "prepare_queries",
    "referenced",
    "score",
    "self_scores",
    "validation",
    "write_report",
]

__getattr__ = loader(
    __name__,
    {
        "CaptureCallback": "stages.trainer",
        "Factors": "stages.factors",
        "LanguageModelTask": "model.tasks",
        "LayerFactors": "stages.factors",
        "PreferenceTask": "model.preferences",
        "Queries": "stages.queries",
        "RewardTask": "model.preferences",
        "Scores": "stages.scores",
        "SequenceClassificationTask": "model.classification",
        "Task": "model.tasks",
        "TokenClassificationTask": "model.classification",
        "attribute_tokens": "stages.attribution",
        "capture": "stages.loop",
        "export_factors": "stages.export",
        "fit": "stages.fit",
        "prepare_queries": "stages.preparation",
        "referenced": "stages.references",
        "score": "stages.scan",
        "self_scores": "stages.scan",
        "write_report": "report.written",
    },
    rooms=("data", "ops", "validation"),
)


def __dir__() -> list[str]:
    return __all__
