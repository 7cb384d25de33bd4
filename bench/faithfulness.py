"""Which way of scoring is true? A bank of retrainings of a small language model, and all of them.

    python bench/faithfulness.py                       # docs/faithfulness.md: halves left out
    python bench/faithfulness.py --fine-tune --refined-layers MLP all      # docs/fine_tuning.md
    python bench/faithfulness.py --refined cg:20 lissa:500 astra:300       # these take hours
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
from ways.attribution import TRACKED, Methods
from ways.small_language_model import CONTEXT, PROMPT, FineTuning, Training, sequences

ROOT = Path(__file__).parents[1]
TRAINED_ON = 64  # sequences whose loss is told
PAIRS = 3  # of removals, whose sum is held against both at once
BESIDE = "EK-FAC, all"  # what every method is compared with
ABOUT = ("epochs", "width", "blocks", "fine_tune", "rest", "epochs_before")


def main(words: list[str]) -> None:
    arguments = chosen(words)
    torch.set_num_threads(1)
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    data, queries, rest = sequences(arguments.sequences, arguments.queries, work / "sequences.json")
    sizes = {"width": arguments.width, "blocks": arguments.blocks}
    training = Training(data, arguments.epochs, **sizes)
    if arguments.fine_tune:
        start = Training(rest[: arguments.rest], arguments.epochs_before, **sizes)
        start.model(0, work / "start")
        training = FineTuning(data, arguments.epochs, **sizes, start=work / "start" / "seed_0")
    about = {x: getattr(arguments, x) for x in ABOUT}
    bank = retrain(
        work / "bank", training, data, queries, subsets=arguments.runs, seeds=arguments.seeds,
        share=arguments.share, about=about, processes=arguments.processes, progress=say,
    )  # fmt: skip
    refined = tuple(
        (how, layers) for layers in arguments.refined_layers for how in arguments.refined
    )
    methods = Methods(training, queries, work, refined)
    adds = additivity(work / "pairs", methods, about, arguments) if arguments.fine_tune else None
    rows, held, scores = [], {}, {}
    groups = arguments.only
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
    facts = described(bank, methods, arguments, words) | {"additivity": adds}
    save_json(work / "faithfulness.json", {"facts": facts, "rows": rows}, checksum=False)
    arguments.page.write_text(page(rows, facts))
    print(arguments.page)


def likeness(scores: np.ndarray, to: np.ndarray) -> dict[str, float]:
    """Means over queries: of the rank correlation, and of the relative error, ||x - y|| / ||y||."""
    far = np.linalg.norm(scores - to, axis=1) / np.linalg.norm(to, axis=1)
    return {"spearman": float(spearman(scores, to).mean()), "error": float(far.mean())}


def additivity(folder: Path, methods: Methods, about: dict, arguments) -> float:
    """Do removals add up? Correlation over queries, the mean of pairs of disjoint removals A, B.

        corr(f(A) + f(B), f(A u B)),    f(X) = measurement without X - measurement with everything

    What a method can predict that sums scores; chaotic training has none of it.
    """
    training, queries = methods.training, methods.queries
    every = np.arange(len(training.data))
    size = max(1, round((1 - arguments.share) * len(every)))
    left_out = []
    for pair in range(PAIRS):
        both = np.random.default_rng([1, pair]).choice(every, 2 * size, replace=False)
        left_out += [both[:size], both[size:], both]
    kept = [np.setdiff1d(every, some).tolist() for some in left_out]
    bank = retrain(
        folder, training, training.data, queries, subsets=kept, about=about,
        processes=arguments.processes,
    )  # fmt: skip
    changed = bank.by_subset[1][:, 0] - np.asarray(measurements(methods.model, queries))
    first, second, union = changed.reshape(PAIRS, 3, len(queries)).swapaxes(0, 1)
    pairs = zip(first + second, union, strict=True)
    return float(np.mean([np.corrcoef(parts, whole)[0, 1] for parts, whole in pairs]))


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
        "fine_tuned": arguments.fine_tune,
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
    made.add_argument("--fine-tune", action="store_true",
                      help="a model of the rest of the text; what is left out is missing from its "
                           "batch, all else stays")  # fmt: skip
    made.add_argument("--rest", type=int, help="sequences of that text; default: all")
    made.add_argument("--epochs-before", type=int, default=15, help="on the rest of the text")
    made.add_argument("--runs", type=int, help="subsets: 64, or 100 when fine-tuned")
    made.add_argument("--seeds", type=int, help="trainings of each: 2, or 1")
    made.add_argument("--share", type=float, help="of the data in a subset: 0.5, or 0.99")
    made.add_argument("--epochs", type=int, help="12, or 20")
    made.add_argument("--sequences", type=int, default=512)
    made.add_argument("--queries", type=int, default=64)
    made.add_argument("--width", type=int, default=64)
    made.add_argument("--blocks", type=int, default=4)
    made.add_argument("--processes", type=int, default=2)
    made.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups")
    made.add_argument("--refined", nargs="+", default=["cg:2", "cg:5", "cg:10"])
    made.add_argument("--refined-layers", nargs="+", choices=TRACKED, default=["MLP"])
    made.add_argument("--work", type=Path)
    made.add_argument("--page", type=Path)
    return made


def chosen(words: list[str]) -> argparse.Namespace:
    """Arguments; what was not given is what the protocol has."""
    found = parser().parse_args(words)
    halves = {"runs": 64, "seeds": 2, "share": 0.5, "epochs": 12, "work": "faithfulness"}
    one_percent = {"runs": 100, "seeds": 1, "share": 0.99, "epochs": 20, "work": "fine_tuning"}
    protocol = one_percent if found.fine_tune else halves
    name = protocol.pop("work")
    for argument, value in protocol.items():
        if getattr(found, argument) is None:
            setattr(found, argument, value)
    found.work = found.work or ROOT / "build" / name
    found.page = found.page or ROOT / "docs" / f"{name}.md"
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
