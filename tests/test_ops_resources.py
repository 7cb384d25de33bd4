"""What a call costs besides time: memory, threads, and what it reads from fresh memory.

Measured from outside, in a process of its own: only there does the high-water mark mean anything.
"""

import json
import os
import subprocess
import sys

import pytest

from ekfac_fast import ops

pytestmark = pytest.mark.skipif(
    not ops.coverage()["eigenvalues"]["cpu"], reason="about the compiled tier"
)

MEMORY = """
import json, re, torch
from ekfac_fast import ops

torch.set_num_threads(2)
calls = torch.ops.ekfac_fast

def arguments(B, T, O, I, Q=2, K=4):
    g, a = torch.randn(B, T, O), torch.randn(B, T, I)
    Qg, Qa, lam = torch.eye(O), torch.eye(I), torch.ones(O, I)
    P, L, R = torch.randn(Q, O, I), torch.randn(Q, O, K), torch.randn(Q, K, I)
    s, scores, tokens = torch.zeros(B), torch.zeros(Q, B), torch.zeros(Q, B, T)
    return {
        "eigenvalues": lambda: calls.eigenvalues(lam, g, a, Qg, Qa),
        "eigenvalues, gradient rotated": lambda: calls.eigenvalues(
            lam, g, a, Qg, Qa, False, "gradient"
        ),
        "self_influence": lambda: calls.self_influence(s, g, a, Qg, Qa, lam, 0.1),
        "dense_scores": lambda: calls.dense_scores(scores, P, g, a),
        "dense_scores, per token": lambda: calls.dense_scores(tokens, P, g, a),
        "low_rank_scores": lambda: calls.low_rank_scores(scores, L, R, g, a),
        "low_rank_scores, per token": lambda: calls.low_rank_scores(tokens, L, R, g, a),
        "reference": lambda: ops.eigenvalues.reference(lam, g, a, Qg, Qa),
    }

def peak():
    # Not ru_maxrss: that of a child starts at its parent's size.
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024

for run in arguments(2, 2, 64, 64).values():
    run()
used = {}
for name, run in arguments(%d, 2, 1024, 1024).items():
    before = peak()
    run()
    used[name] = peak() - before
print(json.dumps(used))
"""

THREADS = """
import json, os, torch
from ekfac_fast import ops
torch.set_num_threads(1)
g, a, Q = torch.randn(4, 64, 512), torch.randn(4, 64, 512), torch.eye(512)
counts = []
for n in (1, 2, 3):
    torch.set_num_threads(n)
    torch.ops.ekfac_fast.eigenvalues(torch.zeros(512, 512), g, a, Q, Q)
    counts.append(len(os.listdir("/proc/self/task")))
print(json.dumps(counts))
"""

KEPT = """
import json, resource, torch
from ekfac_fast import ops

def P(mebibytes):
    g, a = torch.ones(1, 1, 256), torch.ones(1, 1, mebibytes * 1024)
    return torch.ops.ekfac_fast.precondition(g, a, None, None, torch.ones(256, a.shape[2]), 0.0)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) // 256  # MiB

P(1)
before = resident()
many = [P(8) for _ in range(64)]  # more than is kept
del many
kept = resident() - before
P(100)
# lam, 100 MiB of it, is fresh every time.
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
P(100)
print(json.dumps([kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults]))
"""

PARITY = """
import torch
from ekfac_fast import ops
from ekfac_fast.ops.testing import parity
for dtype in (torch.float32, torch.bfloat16):
    for card in ops.ALL:
        for sample in card.samples(dtype):
            parity.check(card, sample, ops.call(card))
print("true")
"""


def report(program: str, **environment: str):
    """What a program prints as JSON on its last line."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_gradients_never_exist():
    """96 gradients of 4 MiB: the reference holds them, no kernel does."""
    B, mebibytes = 96, 96 * 4
    used = report(MEMORY % B)
    assert used.pop("reference") > mebibytes, "the measure does not see what it should"
    # Packed operands, one gradient where one has to be rotated, partial sums.
    assert {name: size for name, size in used.items() if size > 48} == {}


def test_memory_is_kept_for_the_next_call_and_not_more():
    """After many small results, the large one of the next layer is kept in their place."""
    # Everything else goes back to the system at once.
    kept, faults = report(KEPT, MALLOC_MMAP_THRESHOLD_="1000000")
    assert kept < 200  # MiB
    assert faults < 1.5 * 25600, "pages of 4 KiB: lam's, and P's once more"


def test_threads_are_those_of_torch():
    one, two, three = report(THREADS, OMP_NUM_THREADS="4")
    assert (two - one, three - one) == (1, 2)


def test_nothing_is_read_before_it_is_written():
    """glibc fills fresh blocks, tiles included, with 0x7f bytes: 3.4e38 in fp32 and bf16."""
    assert report(PARITY, MALLOC_PERTURB_="128", OMP_NUM_THREADS="2")
