"""Ops against the machine's roofs, kronfluence's contractions and the best plain torch.

    python bench/run.py [--device cpu|cuda] [--op eigenvalues ...] [--shapes gpt2 ...]
        [--dtype float32 bfloat16] [--against kronfluence-order plain-torch] [--compile]
        [--threads 2] [--repeats 7] [--keep-going] [--out bench/results/ops.jsonl]
    python bench/run.py --shapes acceptance

Each row is checked first (two-error rule against fp64, and against the other ways on the tensors
that are timed); a wrong result ends the run. Then all candidates of the row and the GEMM that gives
the roof are timed in turn (A B C A B C), and medians are compared. Rows where we lose are printed
like the others.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import roofs
import torch
from environment import device as device_named
from environment import environment
from shapes import ACCEPTANCE, GRADIENTS, MODELS, ROOF, Case, layers
from timing import extra_bytes, host_seconds, measure, rotating
from work import Ways, Work, agree, check, work

from ekfac_fast import ops

QUANTITIES = (*map(ops.stem, ops.ALL), "queries")
# Sets of inputs at most that a short call is given in turn, so that no cache holds them.
INPUT_SETS = 16


@dataclass(frozen=True)
class Row:
    """One case in one dtype: median seconds by candidate, "ours" and "GEMM" always among them.

    On a GPU also what the host spends on a call, and the bytes that a call takes beyond its inputs.
    `failed` names the candidates that could not run, and why.
    """

    case: Case
    dtype: str
    device: torch.device
    checked: str
    seconds: dict[str, float]
    samples: dict[str, list[float]]
    host_seconds: dict[str, float]
    extra_bytes: dict[str, int]
    failed: dict[str, str]
    flops: int
    bytes: int
    copy_rate: float

    @property
    def flop_rate(self) -> float:
        """FLOPs of the card a second."""
        return self.flops / self.seconds["ours"]

    @property
    def gemm_rate(self) -> float:
        """FLOP/s of the machine's own product, in the same minute."""
        return roofs.gemm_flops(self.device) / self.seconds["GEMM"]

    def times(self, against: str) -> float:
        """Speed over another candidate; of ROOF and GRADIENTS the share that ours has."""
        if against == ROOF:
            return self.flop_rate / self.gemm_rate
        if against == GRADIENTS:
            return self.memory_share()
        return self.seconds[against] / self.seconds["ours"] if against in self.seconds else 0.0

    def memory_share(self) -> float:
        """Bytes at the peak beyond inputs and activations rotated by tokens, over all gradients."""
        s, itemsize = self.case.shape, getattr(torch, self.dtype).itemsize
        sides = 0
        if self.case.quantity in ("eigenvalues", "self_influence") and not self.case.rotated:
            sides = (s.J if s.T < s.O else 0) + (s.O if s.T < s.J else 0)
        beyond = self.extra_bytes["ours"] - itemsize * s.N * sides
        return max(0, beyond) / (itemsize * s.B * s.O * s.J)

    def __str__(self) -> str:
        """The printed line."""
        others = [f"{self.times(n):.2f}x {n}" for n in self.seconds if n not in ("ours", "GEMM")]
        rates = [
            f"{self.seconds['ours'] * 1e6:.0f} us",
            f"{self.flop_rate / 1e9:.0f} GFLOP/s",
            f"{self.bytes / self.seconds['ours'] / 1e9:.1f} GB/s",
            f"{self.times(ROOF):.0%} of {ROOF}",
        ]
        if self.host_seconds:
            rates.append(f"host {self.host_seconds['ours'] * 1e6:.0f} us")
            rates.append(f"+{self.extra_bytes['ours'] / 2**20:.1f} MiB")
            if self.case.shape.O > 1:
                rates.append(f"{self.memory_share():.1%} of the gradients")
        others += [f"{name} failed: {why}" for name, why in self.failed.items()]
        return " | ".join([f"{self.case.label} {self.dtype}", *rates, *others])

    def record(self, environment: dict) -> dict:
        """The JSON line."""
        case = {"per_token": self.case.per_token, "rotated": self.case.rotated}
        return {
            "bench": "ops",
            "name": self.case.label,
            "quantity": self.case.quantity,
            "shape": asdict(self.case.shape) | case,
            "dtype": self.dtype,
            "checked": self.checked,
            "seconds": self.seconds,
            "samples": self.samples,
            "host_seconds": self.host_seconds,
            "extra_bytes": self.extra_bytes,
            "failed": self.failed,
            "flops": self.flops,
            "bytes": self.bytes,
            "roofs": {"flops_per_second": self.gemm_rate, "bytes_per_second": self.copy_rate},
            "environment": environment,
        }


def row(
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
    samples = measure(candidates | {"GEMM": roofs.gemm(dtype, device)}, repeats, device)
    host, extra = {}, {}
    if device.type == "cuda":
        host = {name: host_seconds(call, device) for name, call in candidates.items()}
        for name, call in candidates.items():
            with extra_bytes(device) as taken:
                call()
            extra[name] = taken()
    return Row(
        case,
        str(dtype).removeprefix("torch."),
        device,
        "itself" if checked == case.shape else str(checked),
        {name: statistics.median(taken) for name, taken in samples.items()},
        samples,
        host,
        extra,
        failed,
        jobs[0].cost.flops,
        jobs[0].cost.bytes,
        roofs.copy_rate(device),
    )


def _input_sets(size: int, device: torch.device) -> int:
    """Sets of inputs of `size` bytes that together are more than twice a GPU's L2."""
    if device.type == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(INPUT_SETS, -(-2 * cache // size)))


def _candidates(jobs: list[Work], failed: dict[str, str]) -> dict[str, Callable]:
    """By name what is timed: every set of inputs in turn."""
    listed = [{"ours": job.ours} | job.others | job.beside for job in jobs]
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
        rates = [row.gemm_rate / 1e9 for row in rows if row.dtype == dtype]
        print(f"roof: {dtype} GEMM {min(rates):.0f} to {max(rates):.0f} GFLOP/s")
    copies = [row.copy_rate / 1e9 for row in rows]
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
        got = found.times(need.against)
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
            done = row(case, getattr(torch, dtype), chosen.repeats, ways, device)
        except KeyboardInterrupt:
            return f"interrupted after {len(rows)} of {len(jobs)} rows"
        except Exception as error:
            if not chosen.keep_going:
                raise
            wrong += 1
            print(f"{case.label} {dtype} | WRONG: {error}", flush=True)
            continue
        rows[case, dtype] = done
        print(done, flush=True)
        if chosen.out:
            chosen.out.parent.mkdir(parents=True, exist_ok=True)
            with chosen.out.open("a") as file:
                file.write(json.dumps(done.record(facts)) + "\n")
    return f"{wrong} rows are wrong or did not run" if wrong else None


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument("--op", nargs="+", choices=QUANTITIES, default=QUANTITIES)
    parser.add_argument("--shapes", nargs="+", choices=[*MODELS, "acceptance"], default=["gpt2"])
    dtypes = ["float32", "bfloat16", "float16", "float64"]
    parser.add_argument("--dtype", nargs="+", choices=dtypes, help="default: fp32, bf16 on a GPU")
    against = ["kronfluence-order", "plain-torch"]
    parser.add_argument("--against", nargs="*", choices=against, default=against)
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
