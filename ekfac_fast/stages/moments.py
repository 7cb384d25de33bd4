"""What a fit sums over the data: covariances and, in their eigenbasis, squared gradients."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..curvature.basis import Eigenvectors, SharedRotation
from ..curvature.blocks import on_diagonal
from ..curvature.lookups import are_ids
from ..curvature.memory import give_back
from ..curvature.offload import placed
from ..curvature.sums import Sum
from ..errors import ModelError
from ..model.layer_batch import LayerBatch
from ..model.layers import Layer
from ..model.rows import ONE_BY_ONE, Rows
from ..store.folder import Store
from .consumer import Batch
from .factors import blocks_of
from .parts import rotated
from .run import Run, Stage
from .sums import Sums
from .waiting import Waiting


class Covariances(Sums):
    """Sums of a a^T and g g^T over tokens, and how many tokens each holds.

    Layers that read the same tensor (with a bias alike) share the sum of `a`. As in kronfluence,
    padding is left out of the inputs; gradients are zero there, and counted like inputs. A sum is
    [J, ceil(J / blocks)], as `on_diagonal` reads it; of a side that is diagonal, [J]. A vector has
    a Fisher of its own, over sequences: its rows are their gradients.
    """

    symmetric = True

    def __init__(self, run: Run, store: Store, layers: list[Layer], waiting: Waiting) -> None:
        super().__init__(run, store, Stage.COVARIANCE)
        self.layers, self.waiting, self.blocks = layers, waiting, blocks_of(store.facts)
        self.owners: dict[str, str] = dict(store.state.get("shared", {}))
        self.attention: Tensor | Mapping[str, Tensor] | None = None
        self.masks: list[tuple[Tensor, Rows, Tensor, Tensor]] = []
        self.places = run.places(layers)
        kept, sides = self.state.tensors, ("activation", "gradient")
        self.cov: dict[str, dict[str, Sum]] = {
            s: {
                n: self.found(f"{s} covariance {n}", at=self.places[n])
                for n in _part(kept, f"{s} covariance ")
            }
            for s in sides
        }
        self.count = {
            s: {n: x.to(self.places[n]) for n, x in _part(kept, f"{s} count ").items()}
            for s in sides
        }

    def begin(self, batch: Batch) -> None:
        """What the task says of padding, once a batch."""
        self.attention = self.run.task.get_attention_mask(batch=batch.inputs)
        self.masks.clear()

    def add(self, seen: LayerBatch, batch: Batch) -> None:
        """cov += x^T diag(mask) x on both sides; a second draw waits."""
        if seen.loss:
            self.waiting.keep(seen, batch)
            return
        layer = seen.layer
        if layer.kind == "vector":
            B = len(seen.g)
            self.owners[layer.name] = layer.name
            self._add("activation", layer, seen.a[:, 0], None, B)
            self._add("gradient", layer, seen.g.sum(1), None, B)
            return
        mask, real = self._mask(seen)
        # Which layers share an input is the same in every batch.
        if layer.name not in self.owners:
            self.owners[layer.name] = seen.shared
            if len(self.owners) == len(self.layers):
                self.store.update(shared=self.owners)
        if self.owners[layer.name] == layer.name:
            there = mask if mask is None or seen.filled is None else mask[seen.filled]
            self._add("activation", layer, seen.tokens(seen.a), there, real)
        self._add("gradient", layer, seen.tokens(seen.g), None, real)

    def _add(
        self, side: str, layer: Layer, x: Tensor, mask: Tensor | None, real: Tensor | int
    ) -> None:
        cov, count, name = self.cov[side], self.count[side], layer.name
        of_inputs = side == "activation"
        bias, J = of_inputs and layer.bias, layer.J if of_inputs else layer.O
        whole = bool(layer.turned[0 if of_inputs else 1])
        if name not in cov:
            sizes = (J, -(-J // self.blocks)) if whole else (J,)
            cov[name] = self.found(f"{side} covariance {name}", *sizes, at=x.device)
            count[name] = torch.zeros((), dtype=torch.int64, device=x.device)
        count[name] += real
        own = cov[name].rest
        if are_ids(x):
            ids = x.flatten()
            own.index_add_(0, ids, (torch.ones_like(ids) if mask is None else mask).to(own.dtype))
        elif not whole:
            own += x.to(own.dtype).square().sum(0)
        else:
            for columns, block in on_diagonal(own, self.blocks):
                ones = bias and columns.stop == J
                torch.ops.ekfac_fast.covariance(block, x[:, columns], mask, ones)

    def _mask(self, seen: LayerBatch) -> tuple[Tensor | None, Tensor | int]:
        """Real positions of a layer's rows, flat, or None where every row is real; and how many.

        Layers with the same mask and the same rows share them.
        """
        mask = self.attention
        if isinstance(mask, Mapping):
            mask = mask.get(seen.layer.name)
        routed = seen.rows.places is not None
        if mask is None and routed:
            mask = seen.a.new_ones(seen.rows.sequences, seen.rows.positions, dtype=torch.bool)
        sides = seen.rows.sides  # one row each: of whole sequences
        if mask is None or (seen.rows.positions == sides != mask.shape[-1] and not routed):
            return None, seen.a.shape[0] * seen.a.shape[1]
        for own, rows, real, count in self.masks:
            if own is mask and rows.same(seen.rows) and real.device == seen.g.device:
                return real, count
        found = seen.rows.real(mask.to(seen.g.device))
        if found is None:
            raise ModelError(
                f"layer {seen.layer.name} sees {seen.rows.positions} positions of "
                f"{seen.rows.sequences} sequences but the attention mask is {list(mask.shape)}: "
                "which of them are padding cannot be told. Leave it out of `layers`; or give "
                f"{ONE_BY_ONE[self.run.batches.language]}, so that there is no padding; or a task "
                "whose get_attention_mask returns a mapping from layer names to masks"
            )
        self.masks.append((mask, seen.rows, found, found.sum()))
        return self.masks[-1][2:]

    def end(self, batch: Batch) -> None:
        """Rows that wait lie among what their pass has freed."""
        super().end(batch)
        if batch.number in self.waiting:
            give_back(self.run.device)

    def sums(self) -> Mapping[str, Sum]:
        """Covariances of both sides."""
        return {f"{s} covariance {n}": x for s, part in self.cov.items() for n, x in part.items()}

    def counts(self) -> Mapping[str, Tensor]:
        """Tokens in them."""
        return {f"{s} count {n}": x for s, part in self.count.items() for n, x in part.items()}


class Eigenvalues(Sums):
    """Sums of squared gradients over sequences, in the eigenbasis."""

    def __init__(
        self, run: Run, store: Store, layers: list[Layer], bases: Mapping[str, Eigenvectors]
    ) -> None:
        super().__init__(run, store, Stage.EIGENVALUE)
        places = run.places(layers)
        self.lam = {x.name: self.found(x.name, x.O, x.J, at=places[x.name]) for x in layers}
        self.bases = {x.name: placed(bases[x.name], (x.O, x.J), places[x.name]) for x in layers}
        self.rotate = SharedRotation()

    def add(self, seen: LayerBatch, batch: Batch) -> None:
        """lam += sum_b (Qg^T G_b Qa)^2."""
        name = seen.layer.name
        if name not in self.lam:
            return  # of the first pass, which did not yet know that no token comes here
        whole = self.bases[name].at(seen.g.device)
        for _, basis, g, a, bias in rotated(seen, whole, self.rotate):
            basis.add_eigenvalues(self.lam[name].rest, g, a, bias)

    def sums(self) -> Mapping[str, Sum]:
        """lam of every layer."""
        return self.lam


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose name has a prefix, without it."""
    return {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
