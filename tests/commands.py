"""Commands and scripts, each in a process of its own that is forked where all is imported already.

Importing torch and transformers takes longer than what a test asks of most commands.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

# No product is computed before a fork: no pool of threads survives one.
SERVER = """
import json, os, runpy, sys, traceback, warnings
import ekfac_fast.cli, ekfac_fast.report, ekfac_fast.stages.scan, transformers
from transformers.models.auto import modeling_auto, tokenization_auto
from transformers.models.gpt2 import modeling_gpt2

def run(words, cwd, out, err):
    os.chdir(cwd)
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    warnings.simplefilter("ignore")
    kind, *sys.argv = words
    try:
        if kind == "-m":
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            exec(sys.argv[0], {"__name__": "__main__"})
        else:
            sys.argv.insert(0, kind)
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        code = run(**json.loads(line))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Done(NamedTuple):
    """What a process left."""

    returncode: int
    stdout: str
    stderr: str


class Python:
    """A call is `python *words` in a folder."""

    def __init__(self, folder: Path) -> None:
        self.out, self.err = folder / "stdout", folder / "stderr"
        self.server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"COLUMNS": "120"},
        )  # fmt: skip
        assert self.server.stdout.readline() == "ready\n"

    def __call__(self, *words: object, cwd: Path) -> Done:
        asked = {"words": [*map(str, words)], "cwd": str(cwd)}
        asked |= {"out": str(self.out), "err": str(self.err)}
        print(json.dumps(asked), file=self.server.stdin, flush=True)
        code = int(self.server.stdout.readline())
        return Done(code, self.out.read_text(), self.err.read_text())

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(30)
        self.server.stdout.close()
