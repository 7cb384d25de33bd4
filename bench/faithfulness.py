"""Which way of scoring is true? A bank of retrainings of a small language model, and all of them.

    python bench/faithfulness.py                                   # the page: docs/faithfulness.md
    python bench/faithfulness.py --further                         # LiSSA, ASTRA, CG on all layers
    python bench/faithfulness.py --share 0.99 --epochs 40          # one per cent left out
    python bench/faithfulness.py --runs 8 --seeds 1 --epochs 2 --work /tmp/f --page /tmp/f.md

Two processes of one thread each train, and score; a run that was killed goes on where it was,
training by training and method by method. The same command gives the same numbers on the same
machine.
"""

import argparse
import shlex
import sys
from pathlib import Path

import numpy as np
import torch

from ekfac_fast.store.files import save_json
from ekfac_fast.validation import RetrainingBank, reliability, retrain
from ekfac_fast.validation.lds import lds, spearman
from ekfac_fast.validation.measure import measurements
from measure.environment import environment
from pages.faithfulness_page import GROUPS, page
from ways.attribution import Methods
from ways.small_language_model import CONTEXT, PROMPT, Training, sequences

ROOT = Path(__file__).parents[1]
TRAINED_ON = 64  # sequences whose loss is told
BESIDE = "EK-FAC, all"  # what every method is compared with


def main(words: list[str]) -> None:
    arguments = parser().parse_args(words)
    torch.set_num_threads(1)
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    data, queries = sequences(arguments.sequences, arguments.queries, work / "sequences.json")
    training = Training(data, arguments.epochs, arguments.width, arguments.blocks)
    about = {x: getattr(arguments, x) for x in ("epochs", "width", "blocks")}
    bank = retrain(
        work / "bank", training, data, queries, subsets=arguments.runs, seeds=arguments.seeds,
        share=arguments.share, about=about, processes=arguments.processes, progress=say,
    )  # fmt: skip
    methods = Methods(training, queries, work, further=arguments.further)
    rows, held, scores = [], {}, {}
    groups = arguments.only or list(GROUPS)
    methods.make(groups, arguments.processes)
    for group, name, method in methods.every():
        if group not in groups:
            continue
        kept = methods.kept(group, name, method)
        scores[name] = kept.scores
        held[name] = found = lds(bank, kept.scores, name=name)
        told = {"group": group, "name": name, "seconds": kept.seconds}
        told |= {"tail": float(kept.tail.mean()), "lds": found.interval}
        rows.append(told | {"per_query": found.per_query.tolist()})
        print(f"{group}, {name}: {found.line}, {kept.seconds:.1f} s", flush=True)
    if BESIDE in held:
        for row in rows:
            row["less"] = held[row["name"]].over(held[BESIDE])
            row |= likeness(scores[row["name"]], scores[BESIDE])
            if row["group"] == "blocks":
                print(f"{row['name']}: Spearman {row['spearman']:.4f}, error {row['error']:.3f}")
    facts = described(bank, methods, arguments, words)
    save_json(work / "faithfulness.json", {"facts": facts, "rows": rows}, checksum=False)
    arguments.page.write_text(page(rows, facts))
    print(arguments.page)


def likeness(scores: np.ndarray, to: np.ndarray) -> dict[str, float]:
    """Means over queries: of the rank correlation, and of the relative error, ||x - y|| / ||y||."""
    far = np.linalg.norm(scores - to, axis=1) / np.linalg.norm(to, axis=1)
    return {"spearman": float(spearman(scores, to).mean()), "error": float(far.mean())}


def described(bank: RetrainingBank, methods: Methods, arguments, words: list[str]) -> dict:
    """What a reader has to know of the numbers."""
    model, data = methods.model, methods.training.data
    targets = CONTEXT - PROMPT
    on = environment(torch.device("cpu"))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "examples": bank.examples,
        "queries": bank.queries,
        "subsets": arguments.runs,
        "seeds": arguments.seeds,
        "share": arguments.share,
        "epochs": arguments.epochs,
        "train_loss": float(measurements(model, data[:TRAINED_ON]).mean()) / (CONTEXT - 1),
        "query_loss": float(measurements(model, methods.queries).mean()) / targets,
        "ceiling": reliability(bank),
        "training_seconds": bank.seconds,
        "machine": f"{on['cpu']}, one thread a process",
        "date": on["date"],
        "revision": on["revision"],
        "command": shlex.join(["python", "bench/faithfulness.py", *words]),
    }


def say(done: int, total: int) -> None:
    print(f"trained {done} of {total}", flush=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    made.add_argument("--runs", type=int, default=64, help="subsets")
    made.add_argument("--seeds", type=int, default=2, help="trainings of each")
    made.add_argument("--share", type=float, default=0.5, help="of the data in a subset")
    made.add_argument("--epochs", type=int, default=12)
    made.add_argument("--sequences", type=int, default=512)
    made.add_argument("--queries", type=int, default=64)
    made.add_argument("--width", type=int, default=64)
    made.add_argument("--blocks", type=int, default=4)
    made.add_argument("--processes", type=int, default=2)
    made.add_argument("--further", action="store_true", help="refinements that take hours")
    made.add_argument("--only", nargs="+", choices=GROUPS, help="groups of methods")
    made.add_argument("--work", type=Path, default=ROOT / "build" / "faithfulness")
    made.add_argument("--page", type=Path, default=ROOT / "docs" / "faithfulness.md")
    return made


if __name__ == "__main__":
    main(sys.argv[1:])
