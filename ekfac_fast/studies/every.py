"""All studies of one model and one corpus, with one scan of it."""

from pathlib import Path
from typing import Any, Unpack

from torch import nn

from ..checks import instance, path
from ..data.examples import Corpus
from ..stages.factors import Factors
from ..stages.run import RunArguments
from .depth import TOP, Layers, profiles, read_questions
from .lines import write_result
from .ordering import WordOrder, word_order
from .parallel import Languages, languages
from .recall import Memory, read_passages, recalled, tokenized
from .scored import Joined, asked, per_token, told, uncut
from .sizes import Scan, Sizes, scale
from .tails import Tails, tails

Result = WordOrder | Layers | Tails | Memory | Languages | Sizes


def all_studies(
    model: nn.Module,
    tokenizer: Any,
    factors: Factors,
    data: Corpus,
    *,
    out: str | Path,
    top: int = TOP,
    largest: int | None = None,
    draws: int = 1000,
    rank: int | None = 32,
    damping: float | str | None = None,
    **arguments: Unpack[RunArguments],
) -> dict[str, Result]:
    """Word order, layers, tail, memorisation, languages and scale, with the texts that ship.

    The corpus is scanned once, for the questions of all kinds and the passages together. `out` gets
    a folder a study, with its JSON lines and its drawing; a rerun continues.

    Args:
        model, factors, rank, damping, arguments: see `prepare_queries`.
        tokenizer: the model's.
        data: the corpus.
        top: see `layers`; no more than there are sequences.
        largest, draws: see `tails`.
    """
    instance("factors", factors, Factors, "what fit returns, or Factors(folder)")
    out = path("out", out)
    asks, passages = read_questions(), read_passages()
    recalling, texts = tokenized(passages, tokenizer)
    questions = uncut(asks, tokenizer)
    prepared, found = asked(
        model, factors, Joined((questions, recalling)), Joined((data, texts)), out / "scan",
        rank=rank, damping=damping, **arguments,
    )  # fmt: skip
    Q, N, names = len(asks), len(data), told(asks)
    total = found.total
    one = Scan(
        type(model).__name__, sum(x.numel() for x in model.parameters()), total[:Q, :N],
        questions, data,
    )  # fmt: skip
    settings: Any = {"rank": rank, "damping": damping, **arguments}
    results: dict[str, Result] = {
        "layers": profiles(
            found.part(slice(0, Q), slice(0, N)), questions, data, names,
            [line["kind"] for line in asks], min(top, N),
        ),
        "tail": tails(total[:Q, :N], questions, data, names, largest=largest, draws=draws),
        "memorisation": recalled(total[Q:], per_token(prepared)[Q:], passages, data, tokenizer),
    }  # fmt: skip
    for name, result in results.items():
        write_result(out / name, name, result)
    results["scale"] = scale([one], names, out=out / "scale")
    ask = (model, tokenizer, factors)
    results["word-order"] = word_order(*ask, out=out / "word-order", **settings)
    results["languages"] = languages(*ask, out=out / "languages", **settings)
    return results
