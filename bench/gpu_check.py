"""One GPU, nine minutes: build offline, test, measure; everything into one folder.

    python3 bench/gpu_check.py [--out build/gpu-check] [--list]

Runs with the machine's own Python, torch, triton and compilers, and asks no network: wheels in
`wheels/`, if that folder is there, are installed beside the build, not into the machine's Python.
Every part has a time by which it must end, so that those after it still run; what a part leaves
over, the next may use. Ends with 1 if a part failed or did not finish. Standard library only.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from glob import glob
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "gpu-site"
BENCH = ROOT / "bench"
NEEDED = ("pytest", "hypothesis", "opt_einsum", "transformers", "safetensors", "typer", "rich")
KERNELS = "tests/test_triton_gpu.py"
# The driver's, with their models on the GPU.
DRIVER = (
    "job_gpu",
    "pipeline",
    "blocks",
    "experts",
    "refine",
    "attribution",
    "other_losses",
    "tied",
    "trial",
    "rows",
    "disguises",
)
TAIL = 40
# Seconds that a part which is out of time has to end by itself.
GRACE = 5

GPU = """
import sys, torch
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} in {sys.executable} sees no GPU")
has = torch.cuda.get_device_properties(0)
print(f"{has.name}, {has.total_memory >> 30} GiB, torch {torch.__version__}, {sys.executable}")
"""


@dataclass(frozen=True)
class Part:
    """A command, and the second of the whole check by which it must have ended."""

    name: str
    end: int
    command: tuple[str, ...]
    # Where its output goes; parts of one subject share a file.
    text: str


def parts(out: Path) -> list[Part]:
    """What is run, in order; correctness first."""
    python = sys.executable
    install = (python, "-m", "pip", "install", "--no-index", "--no-deps", "--upgrade")
    install = (*install, "--target", str(SITE))
    build = (*install, "--no-build-isolation", "--verbose", ".")
    found = []
    if wheels := sorted(glob(str(ROOT / "wheels" / "*.whl"))):
        found.append(Part("wheels", 30, (*install, *wheels), "build.txt"))
    found.append(Part("build", 130, build, "build.txt"))
    # Many small kernels are compiled: in parallel where the machine has pytest-xdist. Its Python
    # and torch are not the pinned ones, so their warnings do not fail a test.
    spread, by_file = (("-n", "8"), ("--dist", "loadfile")) if find_spec("xdist") else ((), ())
    options = ("-p", "no:benchmark", "-p", "no:cacheprovider", "-W", "default", "--durations", "5")
    pytest = (python, "-m", "pytest", *options, *spread)
    found.append(Part("tests of kernels", 220, (*pytest, KERNELS), "tests.txt"))
    driver = [f"tests/test_{name}.py" for name in DRIVER]
    driver = (*pytest, *by_file, "--device", "cuda", *driver)
    found.append(Part("tests of the driver", 290, driver, "tests.txt"))
    ops = (python, str(BENCH / "ops.py"), "--device", "cuda", "--shapes", "acceptance")
    ops = (*ops, "--no-compile", "--keep-going", "--out", str(out / "ops.jsonl"))
    found.append(Part("ops", 370, ops, "ops.txt"))
    stages = (python, str(BENCH / "stages.py"), "--device", "cuda", "--no-compile")
    stages = (*stages, "--out", str(out / "stages.jsonl"), "--models")
    for name, end, words in (
        ("scan of Llama-3-8B", 420, ("llama-3-8b", "--stages", "scoring")),
        ("GPT-2 and Pythia-1B", 475, ("gpt2", "pythia-1b")),
        ("blocks of Llama-3-8B and Qwen2.5-7B", 530, ("llama-3-8b", "qwen2.5-7b", "--layers", "2")),
    ):
        found.append(Part(name, end, (*stages, *words), "stages.txt"))
    return found


def run(part: Part, start: float, out: Path) -> str:
    """One part: "ok", or how it went wrong; its output goes to its file and its tail is shown."""
    # PYTHONSAFEPATH: the package is the one that was built, not the sources in this folder.
    path = os.pathsep.join(map(str, (SITE, BENCH)))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    # ninja is installed beside Python.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    limit = part.end - (time.monotonic() - start)
    print(f"\n{part.name}: at most {limit:.0f} s: {' '.join(part.command)}", flush=True)
    with (out / part.text).open("a+") as text:
        text.write(f"{part.name}: {' '.join(part.command)}\n")
        text.flush()
        begin = text.tell()
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env=environment,
            stdout=text,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=max(1.0, limit))
            result = "ok" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            _stop(process)
            result = "out of time"
        text.seek(begin)
        print("".join(text.readlines()[-TAIL:]), end="", flush=True)
    return result


def _stop(process: subprocess.Popen) -> None:
    """End a part with all that it started: pytest and ops.py say first what they have."""
    os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    """Run all parts that the build allows; print and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    chosen = parser.parse_args()
    out = chosen.out.resolve()
    if chosen.list:
        for part in parts(out):
            print(f"{part.name} (by {part.end} s): {' '.join(part.command)}")
        return
    seen = subprocess.run([sys.executable, "-c", GPU], capture_output=True, text=True)
    if seen.returncode:
        *_, told = f"exit status {seen.returncode}\n{seen.stderr.strip()}".splitlines()
        sys.exit(f"gpu-check needs a GPU, and nothing was run: {told}")
    out.mkdir(parents=True, exist_ok=True)
    waiting = parts(out)
    for name in {part.text for part in waiting} | {"ops.jsonl", "stages.jsonl", "summary.json"}:
        (out / name).unlink(missing_ok=True)  # of an earlier check
    for stale in (SITE, *(ROOT / "build").glob("lib*")):
        shutil.rmtree(stale, ignore_errors=True)
    *_, gpu = seen.stdout.splitlines()
    print(gpu)
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        print(f"not installed here, unless wheels/ brings them: {', '.join(missing)}")
    start, results = time.monotonic(), []
    for part in waiting:
        before = time.monotonic()
        result = run(part, start, out)
        took = round(time.monotonic() - before, 1)
        results.append({"part": part.name, "seconds": took, "result": result})
        print(f"{part.name}: {result}, {took} s", flush=True)
        if result != "ok" and part.name == "build":
            break
    (out / "summary.json").write_text(json.dumps({"gpu": gpu, "parts": results}, indent=1) + "\n")
    lines = [f"{x['part']:<40}{x['seconds']:>7.1f} s  {x['result']}" for x in results]
    print("\n".join([f"\n{gpu}", *lines, f"in {out}"]))
    if any(x["result"] != "ok" for x in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
