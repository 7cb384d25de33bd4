"""What is cheaper than influence, as score matrices [Q,N] of the same sign: positive = speaks for.

gradient dot     sum over layers of <grad f, grad L_i>          no curvature at all
gradient cosine  the same, of unit gradients
TF-IDF, BM25     tokens in common                               no model at all
representation   cosine of the mean last hidden states          no training at all
random           what chance does
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Unpack

import numpy as np
import torch
from torch import Tensor, nn

from ..curvature.basis import Basis
from ..curvature.query_gradients import Dense
from ..data.batches import Batches
from ..data.examples import Indexable, example
from ..errors import ModelError
from ..model.alone import alone
from ..model.layer_batch import LayerBatch
from ..model.layers import Layer, select_layers
from ..model.spread import device_of
from ..ops.shapes import wide
from ..stages.candidates import top_candidates
from ..stages.consumer import Batch, Consumer
from ..stages.measured import Gradients
from ..stages.parts import Tally, check_scores
from ..stages.run import Run, RunArguments, Stage, accumulator
from ..stages.scan import adding

# Robertson's: saturation of a term's count, share of the length that counts.
K1, B = 1.5, 0.75


@torch.inference_mode(False)
def gradient_dot(
    model: nn.Module,
    queries: Indexable,
    dataset: Indexable,
    *,
    layers: str | list[str] | None = None,
    cosine: bool = False,
    **arguments: Unpack[RunArguments],
) -> np.ndarray:
    """<grad f_q, grad L_i> over the tracked layers, or their cosine: [Q,N], fp64.

    Arguments are those of `fit` and `score`.

    Raises:
        NotFiniteError: a loss or a product is not finite; names the example.
    """
    tracked = select_layers(model, layers)
    ask = Run(model, queries, {**arguments, "on_long": "refuse"})
    parts: dict[int, dict[str, Tensor]] = {}
    consumer = Gradients(ask, parts.__setitem__)
    batches = ask.batches.divided()
    ask.each(
        Stage.QUERIES, tracked, batches, consumer, loss=consumer.loss, what="measurement"
    )  # fmt: skip
    order = torch.from_numpy(batches.places)
    found = {x.name: torch.cat([parts[n][x.name] for n in range(len(batches))]) for x in tracked}
    places = ask.places(tracked)
    G = {name: x[order].to(places[name]) for name, x in found.items()}
    run = Run(model, dataset, arguments)
    products = _Matrix(run, len(order), adding({name: Dense(x) for name, x in G.items()}))
    run.each(Stage.SCAN, tracked, run.batches.divided(), products)
    if not cosine:
        return products.matrix
    squares = _Matrix(run, 1, _squares(tracked, accumulator(model), places))
    run.each(Stage.SCAN, tracked, run.batches.divided(), squares)
    asked = torch.stack([x.double().square().sum((1, 2)).cpu() for x in G.values()]).sum(0)
    return _over(products.matrix, asked.numpy()[:, None] * squares.matrix)


def _squares(
    layers: Sequence[Layer], dtype: torch.dtype, places: Mapping[str, torch.device]
) -> Callable[[Tensor, LayerBatch], None]:
    """s [1,B] += ||G_b||^2: self-influence where every eigenvalue is 1."""
    ones = {x.name: torch.ones((), dtype=dtype, device=places[x.name]) for x in layers}
    bases = {x.name: Basis(None, None, ones[x.name].expand(x.O, x.J)) for x in layers}

    def add(s: Tensor, seen: LayerBatch) -> None:
        bases[seen.layer.name].add_self_influence(s[0], seen.g, seen.a, seen.layer.bias)

    return add


def _over(products: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """products / sqrt(squares), 0 where a vector is."""
    return np.divide(
        products, np.sqrt(squares), out=np.zeros_like(products), where=squares > 0
    )  # fmt: skip


class _Matrix(Consumer):
    """What `add` adds up for every example: [rows,N], fp64."""

    def __init__(self, run: Run, rows: int, add: Callable[[Tensor, LayerBatch], None]) -> None:
        self.run, self._add = run, add
        self.matrix = np.zeros((rows, run.batches.size))
        self.tally = Tally(rows, wide(run.dtype))

    def begin(self, batch: Batch) -> None:
        """Nothing yet."""
        self.tally.begin()

    def add(self, seen: LayerBatch, batch: Batch) -> None:
        """One layer."""
        self._add(self.tally.on(seen.g.device, len(batch.indices)), seen)

    def end(self, batch: Batch) -> None:
        """Keep the batch."""
        s = self.tally.total()
        check_scores(s, self.run.batches.dataset, batch.indices)
        self.matrix[:, batch.indices] = s.double().numpy()


def tfidf(queries: Indexable, dataset: Indexable) -> np.ndarray:
    """The scores by which `score` chooses candidates (paper, Eq. 28): [Q,N]."""
    asked, texts = _tokens(queries), _tokens(dataset)
    size = 1 + max(int(x.max()) for x in (*asked, *texts))
    best, values = top_candidates([x.tolist() for x in asked], dataset, len(texts), size)
    found = np.zeros(best.shape)
    np.put_along_axis(found, best, values, axis=1)
    return found


def bm25(queries: Indexable, dataset: Indexable, *, k1: float = K1, b: float = B) -> np.ndarray:
    """BM25 over model tokens: [Q,N] (Robertson & Zaragoza 2009).

        score(q,d) = sum over t in q of IDF(t) n_td (k1 + 1) / (n_td + k1 (1 - b + b |d| / mean))
        IDF(t)     = log((N - n_t + 0.5) / (n_t + 0.5) + 1)

    n_td counts t in d, n_t sequences that hold t; a token counts as often as it stands in q.
    """
    asked, texts = _tokens(queries), _tokens(dataset)
    terms = np.unique(np.concatenate(asked))
    place = np.full(1 + max(int(x.max()) for x in (*asked, *texts)), -1)
    place[terms] = np.arange(len(terms))

    def counts(ids: np.ndarray) -> np.ndarray:
        known = place[ids]
        return np.bincount(known[known >= 0], minlength=len(terms))

    n = np.stack([counts(ids) for ids in texts])
    holds = (n > 0).sum(0)
    idf = np.log((len(texts) - holds + 0.5) / (holds + 0.5) + 1)
    lengths = np.array([len(ids) for ids in texts])
    length = k1 * (1 - b + b * lengths / lengths.mean())
    weights = idf * n * (k1 + 1) / (n + length[:, None])
    return np.stack([counts(ids) for ids in asked]) @ weights.T


def _tokens(dataset: Indexable) -> list[np.ndarray]:
    return [example(dataset, i).input_ids.numpy() for i in range(len(dataset))]


def representation(model: nn.Module, queries: Indexable, dataset: Indexable) -> np.ndarray:
    """Cosine of last hidden states, each the mean over a sequence's positions: [Q,N].

    Raises:
        ModelError: the model does not return hidden states as Hugging Face's do.
    """
    a, b = (_states(model, data) for data in (queries, dataset))
    squares = (a * a).sum(1)[:, None] * (b * b).sum(1)
    return _over(a @ b.T, squares)


@torch.no_grad()
def _states(model: nn.Module, dataset: Indexable) -> np.ndarray:
    """[N,D], fp64."""
    batches = Batches(dataset, model, device=device_of(model))
    found: dict[int, np.ndarray] = {}
    with alone(model):
        for some in batches.divided():
            batch = batches.load(some)
            mask = batch["attention_mask"]
            output = model(
                input_ids=batch["input_ids"], attention_mask=mask, output_hidden_states=True
            )
            states = getattr(output, "hidden_states", None)
            if not states:
                raise ModelError(f"{type(model).__name__} returns no hidden states")
            last = states[-1][:, -mask.shape[1] :].double() * mask.unsqueeze(-1)
            means = last.sum(1) / mask.sum(1, keepdim=True)
            found |= dict(zip(some, means.cpu().numpy(), strict=True))
    return np.stack([found[i] for i in range(batches.size)])


def chance(queries: int, examples: int, seed: int = 0) -> np.ndarray:
    """Standard normal numbers: [Q,N]."""
    return np.random.default_rng(seed).standard_normal((queries, examples))
