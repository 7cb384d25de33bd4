"""A program that starts jobs in several processes: forked where all is imported already.

A line of standard input asks for one; the answer is what each process ended with.
"""

import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from dense_ekfac import VOCABULARY, asked, corpus, gpt2, llama
from test_experts import MIXTRAL
from test_model_families import made
from torch.distributed.fsdp import fully_shard

from ekfac_fast import attribute_tokens, fit, prepare_queries, referenced, score, self_scores
from ekfac_fast.errors import Error
from ekfac_fast.stages.processes import Processes
from ekfac_fast.store import folder
from ekfac_fast.validation.baselines import gradient_dot

MODELS = {
    "gpt2": gpt2,
    "gpt2 fp64": lambda: gpt2(torch.float64),
    "llama": llama,
    "llama fp64": lambda: llama(torch.float64),
    "mixtral fp64": lambda: made("Mixtral", **MIXTRAL),
}


def transformer_blocks(network: torch.nn.Module) -> torch.nn.ModuleList:
    return next(x for x in network.modules() if isinstance(x, torch.nn.ModuleList))


def break_at(network: torch.nn.Module, data: list, index: int) -> None:
    """Make one example of the data, and no other, NaN."""
    for place, example in enumerate(data):
        ids = [VOCABULARY - 2 if i == VOCABULARY - 1 else i for i in example["input_ids"]]
        example["input_ids"] = [VOCABULARY - 1, *ids] if place == index else ids
    with torch.no_grad():
        network.get_input_embeddings().weight[VOCABULARY - 1] = torch.nan


def attribution(out: Path) -> None:
    """Of every example, the last of which is NaN."""
    network, data = llama(), corpus(6)
    break_at(network, data, 5)
    factors = fit(network, data[:5], out=out / "fit")
    queries = prepare_queries(network, factors, [data[0]])
    attribute_tokens(network, queries, data, [(0, i) for i in range(6)], batch_tokens=20)


def references(out: Path) -> None:
    """Of pairs, the last of which is NaN."""
    network, data = llama(), corpus(12)
    break_at(network, data, 11)
    pairs = [
        {
            "input_ids": torch.tensor(x["input_ids"] + y["input_ids"]),
            "labels": torch.tensor(x["input_ids"] + y["input_ids"]),
            "sides": torch.tensor([len(x["input_ids"]), len(y["input_ids"])]),
        }
        for x, y in zip(data[::2], data[1::2], strict=True)
    ]
    referenced(network, pairs, batch_tokens=60)


def job(
    out: Path, model: str, examples: int = 13, batch_tokens: int = 40, **changed: object
) -> None:
    """Every stage, into folders below `out`.

    changed: "other data", in a process of that number; "broken", an example whose loss is NaN;
    "sharded", the weights over all processes, by blocks; "query_shards", of the scans;
    "eigenvalue_examples", of the fit.
    """
    rank = Processes.here().rank
    network, data, questions = MODELS[model]().eval(), corpus(examples), asked(3)
    if changed.get("other data") == rank:
        data = corpus(examples, seed=7)
    if "broken" in changed:
        break_at(network, data, changed["broken"])
    if "sharded" in changed:
        for block in transformer_blocks(network):
            fully_shard(block)
        fully_shard(network)
    settings = {"batch_tokens": batch_tokens}
    sample = {"eigenvalue_examples": changed.get("eigenvalue_examples")}
    factors = fit(network, data, out=out / "fit", **sample, **settings)
    # Rounding may choose another of two nearly equal singular values.
    settings["rank"] = 4 if "fp64" in model else None
    held = prepare_queries(network, factors, questions, **settings)
    kept = prepare_queries(network, factors, questions, out=out / "queries", **settings)
    for x, y in zip(held.layers, kept.layers, strict=True):
        assert torch.equal(x.dense(), y.dense())
    if "sharded" not in changed:
        refined = {"refine": "cg:2", "dataset": data, "refine_examples": 3}
        prepare_queries(network, factors, questions, out=out / "cg", **refined, **settings)
    del settings["rank"]
    scans = settings | {"query_shards": changed.get("query_shards", 1)}
    score(network, kept, data, out=out / "scores", attribution=True, **scans)
    score(network, kept, data, out=out / "heap", top_k=3, **scans)
    some = {"candidates": [[0, 1], [2], [examples - 1]]}
    score(network, kept, data, out=out / "some", **some, **scans)
    self_scores(network, factors, data, out=out / "self", **settings)
    # What does not share its work is whole in each.
    np.save(out / f"dot-{rank}.npy", gradient_dot(network, questions, data, **settings))
    if "sharded" in changed:
        assert all(p.requires_grad and p.grad is None for p in network.parameters())
        with pytest.raises(Error, match="sharded"):  # ProcessError in those that come later
            prepare_queries(network, factors, questions, refine="cg:2", dataset=data, **settings)


JOBS = {"all": job, "attribution": attribution, "references": references}


def process(rank: int, size: int, meeting: str, out: str, arguments: dict) -> None:
    """One of `size`; ends with what the exception said in `out`."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder.Pace.due = property(lambda self: True)
    if size > 1:
        dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=size)
    try:
        JOBS[arguments.pop("job", "all")](Path(out), **arguments)
        os._exit(0)
    except BaseException as error:
        known = isinstance(error, Error)
        told = f"{'' if known else 'unexpected: '}{type(error).__name__}: {error}"
        part = Path(f"{out}.part-{rank}")  # a whole message or none, also where it is killed here
        part.write_text(told)
        part.rename(f"{out}.error-{rank}")
        os._exit(1)


def together(size: int, meeting: str, kill: list | None, more: list) -> list[int]:
    """Like torchrun: where one process ends badly, so do the others."""
    children = []
    for rank in range(size):
        children.append(os.fork())
        if not children[-1]:
            process(rank, size, meeting, *more)
    start, codes = time.monotonic(), {}
    while len(codes) < size:
        if kill and time.monotonic() - start > kill[1]:
            os.kill(children[kill[0]], signal.SIGKILL)
            kill = None
        child, status = os.waitpid(-1, os.WNOHANG)
        if not child:
            time.sleep(0.005)
            continue
        rank = children.index(child)
        codes[rank] = os.waitstatus_to_exitcode(status)
        if codes[rank] < 0:
            for other in {*range(size)} - codes.keys():
                os.kill(children[other], signal.SIGKILL)
    return [codes[rank] for rank in range(size)]


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(together(**json.loads(line))), flush=True)
