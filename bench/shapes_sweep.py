"""Every op on a few hundred shapes drawn from a seed, beside the best way in plain torch.

    python bench/shapes_sweep.py --threads 2 --out bench/results/shapes_sweep.jsonl --plot sweep.svg
    python bench/shapes_sweep.py --threads 1 --again EARLIER.jsonl      # only what lost there
    python bench/shapes_sweep.py --device cuda --shapes 100

A row is checked (ours against plain torch), then both are timed in turn and their best times
compared: of many samples the best is what other programs on the machine disturb least. With one
thread the clock is that of the thread; a GPU's calls are queued, as a stage does, and waited for
together. Prints the distribution of ratios per op and the worst rows.
"""

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ekfac_fast import ops
from ekfac_fast.ops.shapes import Shape
from measure.environment import environment
from pages.heat_map import heat_map
from ways.kronfluence_order import with_ones

Call = Callable[[], Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BF16_PRODUCTS = torch.ops.mkldnn._is_mkldnn_bf16_supported()
# FLOPs of one case; torch has no fast products of fp16 on most CPUs, nor of bf16 on those without.
MOST_FLOPS = {
    "cpu": {"float32": 5e9, "bfloat16": 5e9 if BF16_PRODUCTS else 2e8, "float16": 2e8},
    "cuda": {"float32": 1e11, "bfloat16": 1e12, "float16": 1e12},
}
MOST_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 28}  # of what plain torch writes, and of P
BUDGET_SECONDS = 0.1  # of a row
LEAST = 0.95  # a ratio below it is a loss
SHORT_SECONDS = 1e-4  # below, microseconds count and not the ratio
DAMPING = 0.1


@dataclass(frozen=True)
class Case:
    """One op on one shape; `masked` rows (covariance), `strided` inputs, scores `per_token`."""

    op: str
    B: int
    T: int
    I: int
    O: int
    Q: int
    K: int
    bias: bool
    per_token: bool
    masked: bool
    strided: bool
    dtype: str

    @property
    def shape(self) -> Shape:
        """Sizes as the cards know them."""
        if self.op == "covariance":
            return Shape(B=self.B, T=self.T, I=self.I, bias=self.bias)
        return Shape(B=self.B, T=self.T, I=self.I, O=self.O, Q=self.Q, K=self.K, bias=self.bias)

    def fits(self, device: str) -> bool:
        """Whether it runs in half a second or so, plain torch's intermediates included."""
        s, most = self.shape, MOST_ELEMENTS[device]
        written = {
            "covariance": s.N * s.J,
            "dense_scores": s.Q * s.N * s.J if self.per_token else (s.B + s.Q) * s.O * s.J,
            "low_rank_scores": s.N * s.Q * s.K,
        }.get(self.op, s.B * s.O * s.J)
        written = max(written, s.Q * s.O * s.J if self.op == "dense_scores" else 0, s.J * s.J)
        flops = getattr(ops, self.op).cost(s).flops
        return (
            max(written, s.N * s.O, s.O * s.O) <= most and flops <= MOST_FLOPS[device][self.dtype]
        )


def draw(count: int, seed: int, device: str = "cpu") -> list[Case]:
    """`count` shapes, log-uniform in every letter, each with as many of the six ops as fit."""
    chance, cases, shapes = random.Random(seed), [], 0

    def size(low: int, high: int) -> int:
        exact = math.exp(chance.uniform(math.log(low), math.log(high + 1)))
        # Half of all sizes in nature are powers of two or nearly.
        return 1 << round(math.log2(exact)) if chance.random() < 0.5 else int(exact)

    while shapes < count:
        sides = {"I": size(16, 8192), "O": size(16, 8192)}
        tokens = {"B": size(1, 256), "T": size(1, 2048)}
        factors = {"Q": size(1, 1024), "K": min(size(1, 128), *sides.values())}
        dtype = chance.choices(list(DTYPES), [5, 3, 2])[0]
        bias, masked, strided, per_token = (chance.random() < p for p in (0.5, 0.5, 0.15, 0.25))
        drawn = [
            Case(
                op=ops.stem(card),
                **sides,
                **tokens,
                **factors,
                bias=bias,
                per_token=per_token and "scores" in ops.stem(card),
                masked=masked and card is ops.covariance,
                strided=strided,
                dtype=dtype,
            )
            for card in ops.ALL
        ]
        fitting = [case for case in drawn if case.fits(device)]
        cases += fitting
        shapes += len(fitting) >= 3
    return cases


def lost(file: Path) -> list[Case]:
    """The rows of an earlier sweep below LEAST."""
    rows = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    names = [field.name for field in fields(Case)]
    return [Case(**{name: row[name] for name in names}) for row in rows if row["ratio"] < LEAST]


def plain_gradients(g: Tensor, a: Tensor, Qg: Tensor, Qa: Tensor, bias: bool) -> Tensor:
    """Qg^T G_b Qa of every sequence in fp32: each side rotated by tokens where that is cheaper."""
    (B, T, O), J = g.shape, a.shape[-1] + bias
    g_late, a_late = T >= J, T >= O
    g = g if g_late else g @ Qg
    if not a_late:
        rows = a.flatten(0, 1)
        a = (torch.addmm(Qa[-1], rows, Qa[:-1]) if bias else rows @ Qa).view(B, T, J)
    G = torch.bmm(g.mT, with_ones(a, bias and a_late))
    G = G @ Qa if a_late else G
    return (Qg.mT @ G if g_late else G).float()


def calls(case: Case, device: torch.device) -> tuple[Call, Call]:
    """Ours and plain torch's on the same tensors, queries laid out for each beforehand."""
    s, dtype = case.shape, DTYPES[case.dtype]
    draw, rand, zeros = (partial(f, device=device) for f in (torch.randn, torch.rand, torch.zeros))

    def operand(*sizes: int) -> Tensor:
        if case.strided and len(sizes) == 3:
            return draw(sizes[0], sizes[2], sizes[1]).to(dtype).mT
        return draw(*sizes).to(dtype)

    if case.op == "covariance":
        x, cov, other = operand(s.B, s.T, s.I).reshape(s.N, s.I), *zeros(2, s.J, s.J)
        mask = rand(s.N) < 0.8 if case.masked else None

        def plain_covariance() -> Tensor:
            rows = with_ones(x if mask is None or x.is_cuda else x[mask], s.bias)
            if mask is not None and x.is_cuda:  # its host would wait for the number of rows
                rows = rows.where(mask[:, None], 0)
            if dtype == torch.float32:
                return other.addmm_(rows.mT, rows)
            if x.is_cuda:
                return torch.addmm(other, rows.mT, rows, out_dtype=other.dtype, out=other)
            return other.add_(rows.mT @ rows)

        return _into(cov, lambda: ops.call(ops.covariance)(cov, x, mask, s.bias)), plain_covariance
    g, a = operand(s.B, s.T, s.O), operand(s.B, s.T, s.I)
    # Queries are small, so that scores and what plain torch makes of them are numbers of fp16.
    if case.op == "dense_scores":
        return _dense(case, g, a, operand(s.Q, s.O, s.J).contiguous() / (s.O * s.J) ** 0.25)
    if case.op == "low_rank_scores":
        L, R = operand(s.Q, s.O, s.K) / s.O**0.25, operand(s.Q, s.K, s.J) / s.J**0.25
        return _low_rank(case, g, a, L, R)
    Qg, Qa = (draw(n, n).div(n**0.5).to(dtype) for n in (s.O, s.J))
    lam, call = rand(s.O, s.J) + DAMPING, ops.call(getattr(ops, case.op))
    if case.op == "precondition":
        return (
            lambda: call(g, a, Qg, Qa, lam, DAMPING, s.bias),
            lambda: plain_gradients(g, a, Qg, Qa, s.bias).div_(lam + DAMPING),
        )
    if case.op == "eigenvalues":
        into, other = zeros(2, s.O, s.J)
        return (
            _into(into, lambda: call(into, g, a, Qg, Qa, s.bias)),
            lambda: other.add_(plain_gradients(g, a, Qg, Qa, s.bias).square_().sum(0)),
        )
    into, other = zeros(2, s.B)
    return (
        _into(into, lambda: call(into, g, a, Qg, Qa, lam, DAMPING, s.bias)),
        lambda: other.add_(
            plain_gradients(g, a, Qg, Qa, s.bias).square_().div_(lam + DAMPING).sum((1, 2))
        ),
    )


def _scores(case: Case) -> list[int]:
    return [case.Q, case.B, case.T] if case.per_token else [case.Q, case.B]


def _into(out: Tensor, call: Callable[[], None]) -> Call:
    def run() -> Tensor:
        call()
        return out

    return run


def _dense(case: Case, g: Tensor, a: Tensor, P: Tensor) -> tuple[Call, Call]:
    s = case.shape
    into, other = g.new_zeros(2, *_scores(case), dtype=torch.float32)
    laid = ops.dense_scores.laid_out(P)

    def plain() -> Tensor:
        x = with_ones(a, s.bias)
        if not case.per_token:
            return other.add_(P.flatten(1) @ torch.bmm(g.mT, x).flatten(1).mT)
        products = (g.flatten(0, 1) @ P).view(s.Q, s.B, s.T, s.J)
        return other.add_((products * x).sum(-1, dtype=other.dtype))

    ours = _into(into, lambda: ops.call(ops.dense_scores)(into, laid, g, a, s.bias))
    return ours, plain


def _low_rank(case: Case, g: Tensor, a: Tensor, L: Tensor, R: Tensor) -> tuple[Call, Call]:
    s = case.shape
    into, other = g.new_zeros(2, *_scores(case), dtype=torch.float32)
    left, right = L.permute(1, 0, 2).reshape(s.O, -1), R.permute(2, 0, 1).reshape(s.J, -1)
    laid = ops.low_rank_scores.laid_out(L, R)

    def plain() -> Tensor:
        rows = a.flatten(0, 1)
        V = torch.addmm(right[-1], rows, right[:-1]) if s.bias else rows @ right
        terms = (g.flatten(0, 1) @ left).mul_(V).view(s.B, s.T, s.Q, s.K)
        if case.per_token:
            return other.add_(terms.sum(3, dtype=other.dtype).permute(2, 0, 1))
        return other.add_(terms.sum((1, 3), dtype=other.dtype).mT)

    ours = _into(into, lambda: ops.call(ops.low_rank_scores)(into, *laid, g, a, s.bias))
    return ours, plain


def clock_of(device: torch.device, threads: int) -> Callable[[], float]:
    """Seconds, once what was queued is done."""
    if device.type == "cuda":

        def waited() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return waited
    # What else runs on the machine does not count where one thread does all the work.
    return time.thread_time if threads == 1 else time.perf_counter


def best(ways: tuple[Call, ...], clock: Callable[[], float]) -> list[float]:
    """Seconds a call: the best of samples taken in turn; a sample is several short calls."""

    def taken(call: Call, n: int) -> float:
        start = clock()
        for _ in range(n):
            call()
        return (clock() - start) / n

    first = [taken(call, 1) for call in ways]
    often = [max(1, min(50, int(2e-4 / max(s, 1e-7)))) for s in first]
    rounds = max(3, min(100, int(BUDGET_SECONDS / sum(map(lambda s, n: s * n, first, often)))))
    samples = [[taken(call, n) for call, n in zip(ways, often, strict=True)] for _ in range(rounds)]
    return [min(column) for column in zip(*samples, strict=True)]


def row(case: Case, device: torch.device, clock: Callable[[], float], gemm: float) -> dict:
    """Check, then time.

    Raises:
        AssertionError: ours and plain torch differ by more than rounding.
    """
    ours, plain = calls(case, device)
    got, want = ours().clone(), plain().float()
    error = ((got - want).norm() / want.norm().clamp(min=1e-20)).item()
    # 16-bit scores are sums of both signs, rounded once more by plain torch.
    allowed = 1e-3 if case.dtype == "float32" else 0.1
    assert error < allowed, f"{case}: ours and plain torch differ by {error:.1e}"
    seconds, theirs = best((ours, plain), clock)
    flops = getattr(ops, case.op).cost(case.shape, DTYPES[case.dtype].itemsize).flops
    return asdict(case) | {
        "seconds": seconds,
        "plain_seconds": theirs,
        "ratio": theirs / seconds,
        "flops": flops,
        "of_roof": flops / seconds / gemm,
    }


def gemm_rate(dtype: torch.dtype, device: torch.device, clock: Callable[[], float]) -> float:
    """FLOP/s of torch.mm on squares of 8192; on a CPU of torch.mm or oneDNN, the faster, on squares
    of 1536, and of dtypes that are slow there that of fp32.
    """
    if device.type == "cuda":
        x, y = torch.randn(2, 8192, 8192, device=device, dtype=dtype)
        return 2 * 8192**3 / best((lambda: x @ y,), clock)[0]
    dtype = dtype if dtype == torch.bfloat16 and BF16_PRODUCTS else torch.float32
    x, y = (torch.randn(1536, 1536).to(dtype) for _ in range(2))
    linear = torch.ops.mkldnn._linear_pointwise
    ways = (lambda: torch.mm(x, y), lambda: linear(x, y, None, "none", [], ""))
    return 2 * 1536**3 / min(best(ways, clock))


def summary(rows: list[dict]) -> str:
    """Per op the distribution of ratios; then the worst rows."""
    lines = []
    for op in dict.fromkeys(row["op"] for row in rows):
        found = sorted(row["ratio"] for row in rows if row["op"] == op)
        long = [r for r in rows if r["op"] == op and r["seconds"] >= SHORT_SECONDS]
        least = min((r["ratio"] for r in long), default=math.nan)
        losers = sum(r["ratio"] < LEAST for r in long)
        late = max(
            (r["seconds"] - r["plain_seconds"] for r in rows if r["op"] == op and r not in long),
            default=0.0,
        )
        roof = [r["of_roof"] for r in rows if r["op"] == op and r["flops"] > 1e9]
        lines.append(
            f"{op:16} {len(found):4} rows: worst {found[0]:.2f}x, "
            f"tenth {found[len(found) // 10]:.2f}x, median {statistics.median(found):.2f}x, "
            f"best {found[-1]:.1f}x | from 100 us on: "
            f"worst {least:.2f}x, {losers} of {len(long)} below {LEAST}x | shorter: at most "
            f"{late * 1e6:.0f} us over | of roof, > 1 GFLOP: "
            + (f"worst {min(roof):.0%}, median {statistics.median(roof):.0%}" if roof else "none")
        )
    lines.append("worst twenty:")
    for r in sorted(rows, key=lambda r: r["ratio"])[:20]:
        flags = " ".join(k for k in ("bias", "per_token", "masked", "strided") if r[k])
        lines.append(
            f"  {r['ratio']:.2f}x {r['seconds'] * 1e6:9.0f} us  {r['op']} {r['dtype']} B={r['B']} "
            f"T={r['T']} I={r['I']} O={r['O']} Q={r['Q']} K={r['K']} {flags}"
        )
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    """Draw, check, time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=int, default=330)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so many")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--again", type=Path, help="only the rows that lost in this file")
    parser.add_argument("--op", nargs="+", choices=[ops.stem(card) for card in ops.ALL])
    parser.add_argument("--out", type=Path, help="JSON lines")
    parser.add_argument("--plot", type=Path, help="SVG")
    chosen = parser.parse_args(words)
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(chosen.seed)
    device, clock = chosen.device, clock_of(chosen.device, chosen.threads)
    gemm = {name: gemm_rate(dtype, device, clock) for name, dtype in DTYPES.items()}
    facts = environment(device) | {"gemm_rates": gemm}
    rows: list[dict] = []
    start = time.monotonic()
    drawn = draw(chosen.shapes, chosen.seed, device.type)
    for case in lost(chosen.again) if chosen.again else drawn:
        if time.monotonic() - start > chosen.seconds:
            break
        if not chosen.op or case.op in chosen.op:
            rows.append(row(case, device, clock, gemm[case.dtype]))
    if chosen.out:
        chosen.out.write_text("".join(json.dumps(line) + "\n" for line in [facts, *rows]))
    if chosen.plot:
        chosen.plot.write_text(heat_map(rows))
    print(" | ".join(f"{name} {value}" for name, value in facts.items()))
    print(summary(rows))


if __name__ == "__main__":
    with torch.no_grad():
        main()
