"""Where scores come from: layers, tokens and attention heads of each query's top and lowest
sequences.

One pass over the distinct sequences of all queries, in batches of like length; all queries that
name a sequence of a batch are scored at once. Where output and input tokens are asked for, too, the
same pass is differentiated once more for each of a sequence's queries (`attribution`).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..curvature.query_gradients import QueryGradients
from ..errors import ModelError
from ..model.heads import HeadPart, head_parts
from ..model.layer_batch import LayerBatch
from ..model.layers import Layer
from ..model.rows import Grid
from ..store.folder import Pieces, Store
from .attribution import Attributing, Wanted, unattributable
from .consumer import Batch, Consumer
from .outgoing import Outgoing
from .run import Run, Stage, accumulator
from .scores import DETAIL, HEADS, INPUT, KINDS, TARGET, Scores

PIECES, ATTRIBUTED = "detail", "attributed_detail"
HeadParts = Mapping[str, Sequence[HeadPart]]


def explain(
    run: Run,
    layers: Sequence[Layer],
    gradients: dict[str, QueryGradients],
    store: Store,
    counts: tuple[int, int],
    ranked: list[np.ndarray] | None,
    attribution: bool = False,
) -> None:
    """Work out the detail of `counts` top and lowest sequences of every query, one shard a query.

    gradients: of the queries, best as they are kept, not multiplied out.
    ranked: TF-IDF candidates of each query, best first.
    attribution: output and input tokens, too; where that cannot be, the reason is kept.
    """
    run.processes.meet()
    found = Scores(store.folder)
    Q = len(next(iter(gradients.values())))
    sides = [
        {
            "top": found.top(q, counts[0]),
            "lowest": found.top(q, counts[1], lowest=True) if counts[1] else [],
        }
        for q in range(Q)
    ]
    wanted: dict[int, list[int]] = {}
    for q, pairs in enumerate(sides):
        for index in sorted({index for side in pairs.values() for index, _ in side}):
            wanted.setdefault(index, []).append(q)
    heads = head_parts(run.model, layers)
    reason = unattributable(run, layers) if attribution else None
    attributed = attribution and reason is None
    if attributed:
        try:
            tokens = Attributing(run, layers, gradients, wanted)
            _pass(run, layers, gradients, store, wanted, heads, tokens)
        except ModelError as error:
            reason = str(error)
        reason = next(filter(None, run.processes.gathered(reason)), None)
        attributed = reason is None
    if not attributed:
        _pass(run, layers, gradients, store, wanted, heads, None)
    run.processes.meet()
    if not run.processes.first:
        return
    detail: dict[str, Tensor] = {}
    pieces = store.pieces(ATTRIBUTED if attributed else PIECES)
    for number in pieces.done:
        detail |= pieces.read(number)
    shards = store.pieces()
    for q, pairs in enumerate(sides):
        shards.write(q, _shard(q, pairs, detail, None if ranked is None else ranked[q]))
    order = [[p.layer, p.part, len(p.indices)] for own in heads.values() for p in own]
    store.update(heads=order, attribution=reason or "" if attribution else None)


def remove_pieces(store: Store) -> None:
    """What a pass has left: the shards have it."""
    for name in (PIECES, ATTRIBUTED):
        store.pieces(name).remove()


def _pass(
    run: Run,
    layers: Sequence[Layer],
    gradients: dict[str, QueryGradients],
    store: Store,
    wanted: Wanted,
    heads: HeadParts,
    tokens: Attributing | None,
) -> None:
    """What a pass over the sequences says of layers and heads, and of `tokens`, in pieces.

    Raises:
        ModelError: tokens are asked for, and the model cannot be differentiated twice.
    """
    pieces = store.pieces(PIECES if tokens is None else ATTRIBUTED)
    run.each(
        Stage.DETAIL,
        layers,
        run.batches.divided(sorted(wanted)) if tokens is None else tokens.batches(),
        Details(run, layers, gradients, wanted, pieces, heads, tokens),
        done=run.processes.from_first(pieces.done),
        loss=None if tokens is None else tokens.loss,
        capture=None if tokens is None else tokens.capture,
    )


def _shard(
    q: int,
    pairs: dict[str, list[tuple[int, float]]],
    detail: dict[str, Tensor],
    ranked: np.ndarray | None,
) -> dict[str, Tensor]:
    """What is kept of a query."""
    places = {} if ranked is None else {int(i): n for n, i in enumerate(ranked, 1)}
    shard: dict[str, Tensor] = {}
    for side, scored in pairs.items():
        own = [index for index, _ in scored]
        columns = (
            torch.tensor(own, dtype=torch.int64),
            torch.tensor([score for _, score in scored], dtype=torch.float64),
            torch.tensor([places.get(index, 0) for index in own], dtype=torch.int64),
        )
        shard |= {f"{side}.{name}": x for name, x in zip(DETAIL, columns, strict=True)}
        for index in own:
            for kind in ("", *KINDS):
                if (x := detail.get(f"{q} {index}{kind}")) is not None:
                    shard[f"{index}{kind}"] = x
    return shard


class Details(Consumer):
    """Per-token scores of a batch in every layer, for the queries that ask: a piece a batch."""

    def __init__(
        self,
        run: Run,
        layers: Sequence[Layer],
        gradients: dict[str, QueryGradients],
        wanted: Wanted,
        pieces: Pieces,
        heads: HeadParts,
        tokens: Attributing | None = None,
    ) -> None:
        self.run, self.gradients, self.wanted, self.pieces = run, gradients, wanted, pieces
        places = run.places(layers)
        self.heads = {name: [part.to(places[name]) for part in x] for name, x in heads.items()}
        self.tokens = tokens
        self.order = {layer.name: at for at, layer in enumerate(layers)}
        self.dtype = accumulator(run.model)
        self.asking: list[int] = []
        self.pairs: list[tuple[int, int]] = []
        self.rows = self.q = self.b = torch.empty(0, dtype=torch.int64)
        # Of a layer by its place, of the heads in it by its name.
        self.found: Outgoing[int | str] = Outgoing()

    def begin(self, batch: Batch) -> None:
        """The queries that ask for a sequence of this batch, and for which."""
        if self.tokens is not None:
            self.tokens.begin(batch)
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
        if self.rows.device != s.device:  # of a model that is spread over several
            self.rows, self.q, self.b = (x.to(s.device) for x in (self.rows, self.q, self.b))
        own = self.gradients[seen.layer.name].each(lambda x: x[self.rows])
        own.add_scores(s, seen.g, seen.a, seen.layer.bias)
        name = seen.layer.name
        self.found[self.order[name]] = seen.rows.folded(s[self.q, self.b], self.b)
        if name in self.heads:
            self.found[name] = self._by_head(own.each(lambda x: x[self.q]), seen)

    def _by_head(self, own: QueryGradients, seen: LayerBatch) -> Tensor:
        """What the heads of a layer have of every pair's score, part after part: [pairs,heads]."""
        parts, (g, a) = self.heads[seen.layer.name], (x[self.b] for x in (seen.g, seen.a))
        share = own.by_input if parts[0].of_input else own.by_output
        each = share(g, a, seen.layer.bias)
        return torch.cat([part.of(each) for part in parts], 1).to(self.dtype)

    def end(self, batch: Batch) -> None:
        """Keep [L,T] of every pair that is asked for, without padding."""
        self.run.inputs.check()
        found = self.found.take()
        layers = [found[at] for at in range(len(self.order))]
        heads = torch.cat([found[name] for name in self.heads], 1) if self.heads else None
        if batch.grid.positions is None and len({x.shape[-1] for x in layers}) > 1:
            layers = [x.sum(-1, keepdim=True) for x in layers]
        # [pairs,L,T] where all layers are of one width.
        alike = len({x.shape[-1] for x in layers}) == 1
        every = torch.stack(layers, 1) if alike else None
        piece = {}
        for at, (q, b) in enumerate(self.pairs):
            index = batch.indices[b]
            widths, grid = self.run.batches.widths_of(index), batch.grid
            piece[f"{q} {index}"] = (
                torch.stack([by_position(x[at], widths, grid) for x in layers])
                if every is None
                else by_position(every[at], widths, grid)
            )
            if heads is not None:
                piece[f"{q} {index}{HEADS}"] = heads[at]
        if self.tokens is not None:
            self.tokens.end(batch)
            for (q, index), x in self.tokens.found.items():
                piece[f"{q} {index}{TARGET}"] = torch.from_numpy(x.target)
                piece[f"{q} {index}{INPUT}"] = torch.from_numpy(x.input)
            self.tokens.found.clear()
        self.pieces.write(batch.number, piece)


def by_position(s: Tensor, widths: Sequence[int], grid: Grid) -> Tensor:
    """Layers' rows of one example, [...,rows] -> [...,T] real positions of those with padding, of
    several sequences (of these `widths`) end to end.

    What comes before the text (virtual tokens) counts with the first position; what a layer says
    whose rows are no positions (one a sequence, patches), with the last.
    """
    if grid.positions is None:
        return s
    sides = s.unflatten(-1, (grid.sides, -1)).unbind(-2)
    return torch.cat([_of_one(x, T, grid) for x, T in zip(sides, widths, strict=True)], -1)


def _of_one(s: Tensor, T: int, grid: Grid) -> Tensor:
    """`by_position` of one sequence."""
    assert grid.positions is not None
    before = s.shape[-1] - grid.positions
    if before not in (0, grid.before):
        return torch.nn.functional.pad(s.sum(-1, keepdim=True), (T - 1, 0))
    first = s[..., : before + 1].sum(-1, keepdim=True)
    return torch.cat([first, s[..., before + 1 : before + T]], -1)
