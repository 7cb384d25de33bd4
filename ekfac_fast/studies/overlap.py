"""How much of a question stands word for word in a sequence."""

import numpy as np

from ..data.examples import Indexable, example


def overlaps(questions: Indexable, data: Indexable) -> np.ndarray:
    """The share of a question's tokens (of prompt and completion) that a sequence holds: [Q,N].

        sum of IDF over tokens of both / sum of IDF over tokens of the question
        IDF(t) = log((N - n_t + 0.5) / (n_t + 0.5) + 1)

    Each token once; n_t sequences of N hold t, so that what stands everywhere hardly counts.
    """
    asked = [_distinct(questions, q) for q in range(len(questions))]
    terms = np.unique(np.concatenate(asked))
    holds = np.stack([np.isin(terms, _distinct(data, i)) for i in range(len(data))])
    n = holds.sum(0)
    idf = np.log((len(holds) - n + 0.5) / (n + 0.5) + 1)
    weights = np.stack([np.isin(terms, own) for own in asked]) * idf
    found: np.ndarray = weights @ holds.T / weights.sum(1, keepdims=True)
    return found


def _distinct(dataset: Indexable, index: int) -> np.ndarray:
    return np.unique(example(dataset, index).input_ids.numpy())
