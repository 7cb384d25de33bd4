"""Every way to score the sequences of a bank: a name -> a function that gives [Q,N]."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ekfac_fast import Factors, fit, prepare_queries, score
from ekfac_fast.store.files import load_json, replacing, save_json
from ekfac_fast.validation import baselines, tail_patch
from ekfac_fast.validation.ablations import diagonal_factors, kfac_factors, shampoo_factors

from .small_language_model import Training

TRACKED = {"MLP": ["*.mlp.*"], "all": ["*.mlp.*", "*.attn.*"]}
DAMPINGS = (1.0, 0.1, 0.01, 0.001, 0.0001)
RANKS = (64, 32, 16, 8)
BLOCKS = (2, 4, 8)
# A product with the Gauss-Newton matrix of so many examples takes a query 0.8 s of one core.
EXAMPLES = 128
Method = Callable[[], np.ndarray]


class Kept(NamedTuple):
    """What a method gave: scores [Q,N], the processor seconds they took, the tail patch of each
    query.
    """

    scores: np.ndarray
    seconds: float
    tail: np.ndarray


@dataclass
class Methods:
    """Methods on one trained model; what several need (factors) is fitted once and kept."""

    training: Training
    queries: list[dict]
    folder: Path
    refined: tuple[tuple[str, str], ...] = ()  # (how, layers)
    seeds: int = 4

    @cached_property
    def model(self) -> torch.nn.Module:
        """The one that is asked about."""
        return self.training.model(0, self.folder / "models")

    def every(self) -> Iterator[tuple[str, str, Method]]:
        """(group, name, method), the cheap ones first."""
        data, asked = self.training.data, self.queries
        yield "no model", "random", partial(baselines.chance, len(asked), len(data))
        yield "no model", "TF-IDF", partial(baselines.tfidf, asked, data)
        yield "no model", "BM25", partial(baselines.bm25, asked, data)
        yield (
            "no curvature",
            "last hidden states",
            lambda: baselines.representation(self.model, asked, data),
        )
        for layers in TRACKED:
            for cosine, name in ((False, "dot product"), (True, "cosine")):
                yield (
                    "no curvature",
                    f"gradient {name}, {layers}",
                    partial(self.gradients, layers, cosine),
                )
        for layers in TRACKED:
            for kind in ("diagonal", "K-FAC", "EK-FAC", "ec-Shampoo"):
                yield "curvature", f"{kind}, {layers}", partial(self.influence, kind, layers)
        for count in BLOCKS:
            yield "blocks", f"{count} blocks", partial(self.influence, f"{count} blocks", "all")
        for rank in RANKS:
            yield "rank", f"rank {rank}", partial(self.influence, "EK-FAC", "all", rank=rank)
        for share in DAMPINGS:
            damped = partial(self.influence, "EK-FAC", "all", damping=f"{share}x")
            yield "damping", f"{share:g} x mean", damped
        yield (
            "dtype",
            "bf16 passes",
            partial(self.influence, "EK-FAC", "all", autocast=torch.bfloat16),
        )
        for how, layers in self.refined:
            method = partial(self.influence, "EK-FAC", layers, refine=how)
            yield "refined", f"{how}, {layers}", method
        for count in (2, 4):
            if count <= self.seeds:
                yield "ensemble", f"EK-FAC of {count} models", partial(self.ensemble, count)

    def gradients(self, layers: str, cosine: bool) -> np.ndarray:
        """Dot products or cosines."""
        return baselines.gradient_dot(
            self.model, self.queries, self.training.data, layers=TRACKED[layers], cosine=cosine
        )

    def factors(self, kind: str, layers: str, seed: int = 0, autocast=None) -> Factors:
        """Of one kind of curvature."""
        model = self.training.model(seed, self.folder / "models")
        place = self.folder / "factors" / f"{kind} {layers} {seed} {autocast}"
        more = {"layers": TRACKED[layers], "autocast": autocast}
        if kind == "K-FAC":
            return kfac_factors(self.factors("EK-FAC", layers, seed, autocast), place)
        if kind.endswith("blocks"):
            return fit(model, self.training.data, out=place, blocks=int(kind[0]), **more)
        fitted = {"diagonal": diagonal_factors, "ec-Shampoo": shampoo_factors, "EK-FAC": fit}
        return fitted[kind](model, self.training.data, out=place, **more)

    def influence(
        self, kind: str, layers: str, seed=0, rank=None, damping=None, refine=None, autocast=None
    ) -> np.ndarray:
        """Scores by factors of a kind."""
        factors = self.factors(kind, layers, seed, autocast)
        model, data = self.training.model(seed, self.folder / "models"), self.training.data
        some = min(EXAMPLES, len(data))
        sample = {"refine": refine, "dataset": data, "refine_examples": some}
        refined = {} if refine is None else sample
        queries = prepare_queries(
            model, factors, self.queries, rank=rank, damping=damping, autocast=autocast, **refined
        )
        place = self.folder / "scores" / f"{time.time_ns()}"
        return np.array(score(model, queries, data, out=place, autocast=autocast).matrix)

    def ensemble(self, count: int) -> np.ndarray:
        """The mean of the scores of models that differ in their seed."""
        return np.mean([self.influence("EK-FAC", "all", seed) for seed in range(count)], axis=0)

    def make(self, groups: list[str], processes: int) -> None:
        """Keep what the methods of these groups give: the longest, refinements, beside the rest."""
        names = [(group, name) for group, name, _ in self.every() if group in groups]
        long = [[x] for x in reversed(names) if x[0] == "refined"]
        jobs = [*long[:1], [x for x in names if x[0] != "refined"], *long[1:]]
        if processes == 1:
            for job in jobs:
                self.keep(job)
            return
        for layers in TRACKED:  # which several would fit at once
            self.factors("EK-FAC", layers)
        mine, spawn = replace(self), get_context("spawn")
        with ProcessPoolExecutor(processes, spawn, torch.set_num_threads, (1,)) as pool:
            list(pool.map(mine.keep, jobs))

    def keep(self, names: list[tuple[str, str]]) -> None:
        """Score by methods of these names."""
        for group, name, method in self.every():
            if (group, name) in names:
                self.kept(group, name, method)

    def kept(self, group: str, name: str, method: Method) -> Kept:
        """What a method gives, from the folder where it is there."""
        place = self.folder / "methods" / f"{group} {name}"
        values, told = place.with_suffix(place.suffix + ".npy"), Path(f"{place}.json")
        if not told.exists():
            start = time.process_time()
            found = method()
            seconds = time.process_time() - start
            data = self.training.data
            tail = tail_patch(self.model, self.queries, data, {name: found}, controls=False)[name]
            with replacing(values, found.nbytes) as partial_file, partial_file.open("wb") as file:
                np.save(file, found)
            save_json(told, {"seconds": seconds, "tail": tail.tolist()})
            print(f"scored: {group}, {name}", flush=True)
        there = load_json(told, ours=True)
        return Kept(np.load(values), there["seconds"], np.array(there["tail"]))
