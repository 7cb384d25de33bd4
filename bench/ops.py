"""Ops against the machine's roofs, kronfluence's contractions and the best plain torch.

    python bench/ops.py [--device cpu|cuda] [--op eigenvalues ...] [--shapes gpt2 ...]
        [--dtype float32 bfloat16] [--against kronfluence-order plain-torch] [--compile]
        [--threads 2] [--repeats 7] [--keep-going] [--out bench/results/ops.jsonl]
    python bench/ops.py --shapes acceptance

Each row is checked first (two-error rule against fp64, and against the other ways on the tensors
that are timed); a wrong result ends the run. Then all candidates of the row and the GEMM that gives
the roof are timed in turn (A B C A B C), and medians are compared. Rows where we lose are printed
like the others.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ekfac_fast import ops
from ekfac_fast.ops.shapes import Shape
from measure import roofs
from measure.environment import device as device_named
from measure.environment import environment
from measure.rows import GEMM, OURS, Row, append
from measure.timing import extra_bytes, host_seconds, measure, rotating
from ways.op_ways import Ways, Work, agree, check, work
from ways.shapes import ACCEPTANCE, GRADIENTS, MODELS, ROOF, Case, layers

QUANTITIES = (*map(ops.stem, ops.ALL), "queries")
# Sets of inputs at most that a short call is given in turn, so that no cache holds them.
INPUT_SETS = 16


def against(row: Row, other: str) -> float:
    """Speed over another candidate; of ROOF and GRADIENTS the share that ours has."""
    if other == ROOF:
        return row.gemm_share
    return memory_share(row) if other == GRADIENTS else row.times(other)


def memory_share(row: Row) -> float:
    """Bytes at the peak beyond inputs and activations rotated by tokens, over all gradients."""
    sizes = dict(row.shape)
    rotated, _ = sizes.pop("rotated"), sizes.pop("per_token")
    s, itemsize = Shape(**sizes), getattr(torch, row.dtype).itemsize
    sides = 0
    if row.quantity in ("eigenvalues", "self_influence") and not rotated:
        sides = (s.J if s.T < s.O else 0) + (s.O if s.T < s.J else 0)
    beyond = row.extra_bytes[OURS] - itemsize * s.N * sides
    return max(0, beyond) / (itemsize * s.B * s.O * s.J)


def line(row: Row) -> str:
    """The printed line."""
    others = [f"{row.times(name):.2f}x {name}" for name in row.seconds if name not in (OURS, GEMM)]
    rates = [
        f"{row.ours * 1e6:.0f} us",
        f"{row.flop_rate / 1e9:.0f} GFLOP/s",
        f"{row.bytes / row.ours / 1e9:.1f} GB/s",
        f"{row.gemm_share:.0%} of {ROOF}",
    ]
    if row.host_seconds:
        rates.append(f"host {row.host_seconds[OURS] * 1e6:.0f} us")
        rates.append(f"+{row.extra_bytes[OURS] / 2**20:.1f} MiB")
        if row.shape["O"] > 1:
            rates.append(f"{memory_share(row):.1%} of the gradients")
    others += [f"{name} failed: {why}" for name, why in row.failed.items()]
    return " | ".join([f"{row.name} {row.dtype}", *rates, *others])


def measured(
    case: Case, dtype: torch.dtype, repeats: int, ways: Ways, device: torch.device | None = None
) -> Row:
    """Check one case, then time it."""
    device = device or torch.device("cpu")
    torch.manual_seed(0)
    torch.compiler.reset()
    checked = check(case, dtype, device)
    jobs = [work(case, dtype, device, ways)]
    failed = agree(jobs[0], dtype)
    more = _input_sets(jobs[0].cost.bytes, device) - 1
    jobs += [work(case, dtype, device, ways) for _ in range(more)]
    candidates = _candidates(jobs, failed)
    if dtype == torch.bfloat16 and device.type == "cpu":
        candidates["own fp32"] = work(case, torch.float32, device, Ways(False, False)).ours
    samples = measure(candidates | {GEMM: roofs.gemm(dtype, device)}, repeats, device)
    seconds = {name: statistics.median(taken) for name, taken in samples.items()}
    host, extra = {}, {}
    if device.type == "cuda":
        host = {name: host_seconds(call, device) for name, call in candidates.items()}
        for name, call in candidates.items():
            with extra_bytes(device) as taken:
                call()
            extra[name] = taken()
    return Row(
        bench="ops",
        name=case.label,
        quantity=case.quantity,
        shape=asdict(case.shape) | {"per_token": case.per_token, "rotated": case.rotated},
        dtype=str(dtype).removeprefix("torch."),
        seconds=seconds,
        samples=samples,
        host_seconds=host,
        extra_bytes=extra,
        failed=failed,
        flops=jobs[0].cost.flops,
        bytes=jobs[0].cost.bytes,
        roofs={
            "flops_per_second": roofs.gemm_flops(device) / seconds[GEMM],
            "bytes_per_second": roofs.copy_rate(device),
        },
        details={"checked": "itself" if checked == case.shape else str(checked)},
    )


def _input_sets(size: int, device: torch.device) -> int:
    """Sets of inputs of `size` bytes that together are more than twice a GPU's L2."""
    if device.type == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(INPUT_SETS, -(-2 * cache // size)))


def _candidates(jobs: list[Work], failed: dict[str, str]) -> dict[str, Callable]:
    """By name what is timed: every set of inputs in turn."""
    listed = [{OURS: job.ours} | job.others | job.beside for job in jobs]
    return {
        name: rotating([calls[name] for calls in listed])
        for name in listed[0]
        if name not in failed
    }


def cases(models: list[str], quantities: list[str]) -> Iterator[Case]:
    """The rows of the chosen models and quantities."""
    for model in models:
        yield from (case for case in layers(model) if case.quantity in quantities)


def print_roofs(rows: list[Row]) -> None:
    """The rates that the rows were measured against, lowest to highest of the run."""
    for dtype in dict.fromkeys(row.dtype for row in rows):
        rates = [row.roofs["flops_per_second"] / 1e9 for row in rows if row.dtype == dtype]
        print(f"roof: {dtype} GEMM {min(rates):.0f} to {max(rates):.0f} GFLOP/s")
    copies = [row.roofs["bytes_per_second"] / 1e9 for row in rows]
    print(f"roof: copy {min(copies):.1f} to {max(copies):.1f} GB/s")


def acceptance(
    rows: dict[tuple[Case, str], Row], quantities: list[str], device: torch.device
) -> None:
    """The issue's table with what was measured beside what is required."""
    for need in ACCEPTANCE[device.type]:
        if need.case.quantity not in quantities:
            continue
        line = f"{need.case.label} {need.dtype} | {need.against} | required"
        form = "{:.1%}" if need.against in (ROOF, GRADIENTS) else "{:.2f}x"
        bound = "at most " if need.against == GRADIENTS else ""
        line += f" {bound}{form.format(need.ratio)} | measured"
        if (found := rows.get((need.case, need.dtype))) is None:
            print(f"{line} nothing: the row failed or did not run | NOT MET")
            continue
        got = against(found, need.against)
        print(f"{line} {form.format(got)} | {'met' if need.met(got) else 'NOT MET'}")


def time_rows(
    jobs: list[tuple[Case, str]],
    rows: dict[tuple[Case, str], Row],
    chosen: argparse.Namespace,
    ways: Ways,
    device: torch.device,
    facts: dict,
) -> str | None:
    """Fill `rows`, printing each and appending it to the file; what went wrong, if anything.

    An interrupt ends it early: what was measured until then is still judged.
    """
    wrong = 0
    for case, dtype in jobs:
        try:
            done = measured(case, getattr(torch, dtype), chosen.repeats, ways, device)
        except KeyboardInterrupt:
            return f"interrupted after {len(rows)} of {len(jobs)} rows"
        except Exception as error:
            if not chosen.keep_going:
                raise
            wrong += 1
            print(f"{case.label} {dtype} | WRONG: {error}", flush=True)
            continue
        rows[case, dtype] = done
        print(line(done), flush=True)
        if chosen.out:
            append(chosen.out, [replace(done, environment=facts)])
    return f"{wrong} rows are wrong or did not run" if wrong else None


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument("--op", nargs="+", choices=QUANTITIES, default=QUANTITIES)
    parser.add_argument("--shapes", nargs="+", choices=[*MODELS, "acceptance"], default=["gpt2"])
    dtypes = ["float32", "bfloat16", "float16", "float64"]
    parser.add_argument("--dtype", nargs="+", choices=dtypes, help="default: fp32, bf16 on a GPU")
    others = ["kronfluence-order", "plain-torch"]
    parser.add_argument("--against", nargs="*", choices=others, default=others)
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="time plain torch also through torch.compile; default: on a GPU",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--keep-going", action="store_true", help="past a row that is wrong")
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Parse, check, time, print, append."""
    chosen = parse(words)
    device = device_named(chosen.device)
    torch.set_num_threads(chosen.threads)
    facts = environment(device)
    print(" | ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    compiled = device.type == "cuda" if chosen.compile is None else chosen.compile
    ways = Ways("kronfluence-order" in chosen.against, "plain-torch" in chosen.against, compiled)
    dtypes = chosen.dtype or ["float32" if device.type == "cpu" else "bfloat16"]
    models = [name for name in chosen.shapes if name != "acceptance"]
    jobs = [(case, dtype) for case in cases(models, chosen.op) for dtype in dtypes]
    if "acceptance" in chosen.shapes:
        needs = ACCEPTANCE[device.type]
        jobs += [(need.case, need.dtype) for need in needs if need.case.quantity in chosen.op]
    rows: dict[tuple[Case, str], Row] = {}
    problems = time_rows(list(dict.fromkeys(jobs)), rows, chosen, ways, device, facts)
    if rows:
        print_roofs(list(rows.values()))
    if "acceptance" in chosen.shapes:
        acceptance(rows, chosen.op, device)
    if problems:
        sys.exit(problems)


if __name__ == "__main__":
    with torch.no_grad():
        main()
