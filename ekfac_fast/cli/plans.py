"""A plan as tables: what a run would cost, layer by kind of layer and stage by stage."""

from collections import Counter

from rich.table import Table

from ..report.text import amount, duration
from ..stages.plan import Plan
from .runs import covered
from .terminal import Terminal

GIB = 2**30


def show(
    costs: Plan, console: Terminal, tracked: int, parameters: int, processes: int, measured: bool
) -> None:
    """Print a plan; layers that are alike are one row."""
    chosen = Table("layers", "I", "O", "bias", "scored by", "the first", box=None, pad_edge=False)
    kinds = [(x.I, x.O, x.bias, how) for x, how in zip(costs.layers, costs.scored_by, strict=True)]
    for kind, count in Counter(kinds).items():
        I, O, bias, how = kind
        first = costs.layers[kinds.index(kind)].name
        chosen.add_row(str(count), str(I), str(O), "yes" if bias else "-", how, first)
    console.print(chosen)
    console.say(f"\n{covered(costs.layers, tracked, parameters)}")
    console.say(f"{amount(parameters)} parameters in all, {_gib(4 * parameters)} in fp32")
    fitted = f"in {costs.partitions} parts, each with passes of its own"
    console.say(f"layers fitted    {'all at once' if costs.partitions == 1 else fitted}")
    disk = f"{_gib(costs.factor_bytes)}, {_gib(costs.disk_bytes)} while they are fitted"
    console.say(f"factors on disk  {disk}")
    said = "kept" if costs.keeps_covariances else "dropped once they are decomposed"
    console.say(f"covariances      {_gib(costs.covariance_bytes)}, {said}")
    console.say(f"queries          {_gib(costs.query_bytes)}")
    console.say(f"batch_tokens     {costs.batch_tokens}\n")
    columns = ["stage", "TFLOP", "time", "memory", *(["sent"] if processes > 1 else [])]
    work = Table(*columns, box=None, pad_edge=False)
    for x in costs.stages:
        sent = [_gib(x.sent)] if processes > 1 else []
        work.add_row(x.name, f"{x.flops / 1e12:.3g}", duration(x.seconds), _gib(x.memory), *sent)
    console.print(work)
    each = f", in each of {processes} processes" if processes > 1 else ""
    rate = f"{costs.gemm_rate / 1e9:,.0f} GFLOP/s"
    rate += ", measured now (fp32 product of 1024^2)" if measured else ", as given"
    console.say(f"at {rate}{each}; memory beside the interpreter and mapped files")


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
