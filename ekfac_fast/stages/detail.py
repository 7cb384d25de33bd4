"""Where scores come from: layer x token detail of each query's top and lowest sequences.

One pass over the distinct sequences of all queries, in batches of like length; all queries that
name a sequence of a batch are scored at once.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..curvature.query_gradients import QueryGradients
from ..model.layer_batch import LayerBatch
from ..model.layers import Layer
from ..model.rows import Grid
from ..store.folder import Pieces, Store
from .consumer import Batch, Consumer
from .outgoing import Outgoing
from .run import Run, Stage, accumulator
from .scores import DETAIL, Scores

PIECES = "detail"


def explain(
    run: Run,
    layers: Sequence[Layer],
    gradients: dict[str, QueryGradients],
    store: Store,
    counts: tuple[int, int],
    ranked: list[np.ndarray] | None,
) -> None:
    """Work out the detail of `counts` top and lowest sequences of every query, one shard a query.

    ranked: TF-IDF candidates of each query, best first.
    """
    run.processes.meet()
    found = Scores(store.folder)
    Q, shards, pieces = len(next(iter(gradients.values()))), store.pieces(), store.pieces(PIECES)
    sides = [
        {
            "top": found.top(q, counts[0]),
            "lowest": found.top(q, counts[1], lowest=True) if counts[1] else [],
        }
        for q in range(Q)
    ]
    wanted: dict[int, list[int]] = {}
    for q, pairs in enumerate(sides):
        for index in {index for side in pairs.values() for index, _ in side}:
            wanted.setdefault(index, []).append(q)
    run.each(
        Stage.DETAIL,
        layers,
        run.batches.divided(sorted(wanted)),
        Details(run, layers, gradients, wanted, pieces),
        done=run.processes.told(pieces.done),
    )
    run.processes.meet()
    if not run.processes.first:
        return
    pieces = store.pieces(PIECES)
    detail: dict[str, Tensor] = {}
    for number in pieces.done:
        detail |= pieces.read(number)
    for q, pairs in enumerate(sides):
        places = {} if ranked is None else {int(i): n for n, i in enumerate(ranked[q], 1)}
        shard: dict[str, Tensor] = {}
        for side, scored in pairs.items():
            own = [index for index, _ in scored]
            columns = (
                torch.tensor(own, dtype=torch.int64),
                torch.tensor([score for _, score in scored], dtype=torch.float64),
                torch.tensor([places.get(index, 0) for index in own], dtype=torch.int64),
            )
            shard |= {f"{side}.{name}": x for name, x in zip(DETAIL, columns, strict=True)}
            shard |= {f"{index}": detail[f"{q} {index}"] for index in own}
        shards.write(q, shard)


class Details(Consumer):
    """Per-token scores of a batch in every layer, for the queries that ask: a piece a batch."""

    def __init__(
        self,
        run: Run,
        layers: Sequence[Layer],
        gradients: dict[str, QueryGradients],
        wanted: dict[int, list[int]],
        pieces: Pieces,
    ) -> None:
        self.run, self.gradients, self.wanted, self.pieces = run, gradients, wanted, pieces
        self.order = {layer.name: at for at, layer in enumerate(layers)}
        self.dtype = accumulator(run.model)
        self.asking: list[int] = []
        self.pairs: list[tuple[int, int]] = []
        self.rows = self.q = self.b = torch.empty(0, dtype=torch.int64)
        self.found: Outgoing[int] = Outgoing()

    def begin(self, batch: Batch) -> None:
        """The queries that ask for a sequence of this batch, and for which."""
        self.asking = sorted({q for index in batch.indices for q in self.wanted[index]})
        self.pairs = [(q, b) for b, i in enumerate(batch.indices) for q in self.wanted[i]]
        row = {q: at for at, q in enumerate(self.asking)}
        places = [*self.asking, *(row[q] for q, _ in self.pairs), *(b for _, b in self.pairs)]
        # Lists would go to the device again in every layer.
        sizes = [len(self.asking), len(self.pairs), len(self.pairs)]
        self.rows, self.q, self.b = torch.tensor(places).to(self.run.device).split(sizes)

    def add(self, seen: LayerBatch, batch: Batch) -> None:
        """s [Q,B,T] of one layer; what is kept is [pairs,T]."""
        B, T = seen.g.shape[:2]
        s = torch.zeros(len(self.asking), B, T, dtype=self.dtype, device=seen.g.device)
        own = self.gradients[seen.layer.name].each(lambda x: x[self.rows])
        own.add_scores(s, seen.g, seen.a, seen.layer.bias)
        self.found[self.order[seen.layer.name]] = seen.rows.folded(s[self.q, self.b], self.b)

    def end(self, batch: Batch) -> None:
        """Keep [L,T] of every pair that is asked for, without padding."""
        found = self.found.take()
        layers = [found[at] for at in range(len(self.order))]
        if batch.grid.positions is None and len({x.shape[-1] for x in layers}) > 1:
            layers = [x.sum(-1, keepdim=True) for x in layers]
        # [pairs,L,T] where all layers are of one width.
        alike = len({x.shape[-1] for x in layers}) == 1
        every = torch.stack(layers, 1) if alike else None
        piece = {}
        for at, (q, b) in enumerate(self.pairs):
            index = batch.indices[b]
            T, grid = int(self.run.batches.lengths[index]), batch.grid
            piece[f"{q} {index}"] = (
                torch.stack([by_position(x[at], T, grid) for x in layers])
                if every is None
                else by_position(every[at], T, grid)
            )
        self.pieces.write(batch.number, piece)


def by_position(s: Tensor, T: int, grid: Grid) -> Tensor:
    """Layers' rows of one sequence, [...,rows] -> [...,T] real positions of those with padding.

    What comes before the text (virtual tokens) counts with the first position; what a layer says
    whose rows are no positions (one a sequence, patches), with the last.
    """
    if grid.positions is None:
        return s
    before = s.shape[-1] - grid.positions
    if before not in (0, grid.before):
        return torch.nn.functional.pad(s.sum(-1, keepdim=True), (T - 1, 0))
    first = s[..., : before + 1].sum(-1, keepdim=True)
    return torch.cat([first, s[..., before + 1 : before + T]], -1)
