"""The package as a user installs it: without torch at build time, and with a broken extension."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest

import ekfac_fast
from ekfac_fast import ops

ROOT = Path(__file__).parents[1]
NOT_IN_A_CLONE = shutil.ignore_patterns(
    ".*", "*.so", "*.egg-info", "__pycache__", "build", "dist", "demo", "bench", "tests"
)

BUILD = """
import sys
from importlib.util import find_spec
assert find_spec("torch") is None
from setuptools import build_meta
build_meta.build_wheel(sys.argv[1])
"""


def run(*command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built as in pip's isolation: this Python, setuptools, no torch, the tree of a clone."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "tree", ignore=NOT_IN_A_CLONE)
    site = folder / "site"
    site.mkdir()
    for file in metadata.files("setuptools"):
        top = file.parts[0]
        if top != ".." and not (site / top).exists():
            (site / top).symlink_to(metadata.distribution("setuptools").locate_file(top))
    done = run(
        *(sys.executable, "-S", "-c", BUILD, str(folder)),
        cwd=folder / "tree",
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(site)},
    )
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel) -> Path:
    """A folder to import the wheel from, as `pip install --target` leaves it."""
    target = wheel.parent / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def python(program: str, target: Path) -> subprocess.CompletedProcess:
    """Run a program that imports ekfac_fast from `target`, and torch from where it is."""
    # -S: an editable install's finder would lend its _C to the package in `target`.
    path = os.pathsep.join([str(target), sysconfig.get_path("purelib")])
    return run(
        *(sys.executable, "-S", "-c", program), cwd=target, env=os.environ | {"PYTHONPATH": path}
    )


def test_the_wheel_installs_one_name(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"ekfac_fast"}


def test_the_wheel_holds_every_file_of_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("ekfac_fast/")}
    sources = {
        f"ekfac_fast/{prefix}{path.relative_to(folder)}"
        for folder, prefix in (
            (ROOT / "ekfac_fast", ""),
            (ROOT / "triton_kernels", "triton_kernels/"),
        )
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    }
    assert names == sources


def test_without_torch_at_build_time_the_reference_runs(installed):
    program = """
import torch, ekfac_fast
from ekfac_fast import ops
from ekfac_fast.ops.testing import parity
assert not any(tiers["cpu"] for tiers in ops.coverage().values())
for card in ops.ALL:
    for sample in card.samples(torch.float64):
        parity.check(card, sample, ops.call(card))
print(ekfac_fast.__file__)
"""
    done = python(program, installed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(installed / "ekfac_fast" / "__init__.py")


def test_a_broken_extension_raises(installed, tmp_path):
    shutil.copytree(installed, tmp_path / "broken")
    (tmp_path / "broken" / "ekfac_fast" / "_C.abi3.so").write_bytes(b"not a library")
    done = python("import ekfac_fast.ops", tmp_path / "broken")
    assert done.returncode
    assert "ImportError" in done.stderr
    assert "_C.abi3.so" in done.stderr


def table(text: str) -> dict[str, list[str]]:
    """Words of each line after the first, by the first."""
    return {words[0]: words[1:] for line in text.splitlines() if (words := line.split())}


def test_doctor_tells_what_runs(installed):
    here = table(run(sys.executable, "-m", "ekfac_fast", "doctor", cwd=ROOT / "tests").stdout)
    there = table(python("from ekfac_fast.cli import app; app(['doctor'])", installed).stdout)
    for name in ("torch", "numpy", "triton"):
        assert here[name] == there[name] == [metadata.version(name)]
    assert here["ekfac_fast"] == [metadata.version("ekfac-fast")]
    assert here["python"] == [sys.version.split()[0]]
    for card in ops.ALL:
        stem = ops.stem(card)
        tiers = ops.coverage()[stem]
        assert here[stem] == [
            "yes" if tiers[tier] else "-" for tier in ("reference", "cpu", "cuda")
        ]
        assert there[stem][:2] == ["yes", "-"]
    assert "built" in here["extension"][0]
    assert there["extension"][:2] == ["not", "built:"]


def test_pins_are_the_same_everywhere():
    pins = dict(
        re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "requirements" / "test.txt").read_text(), re.M)
    )
    hooks = re.findall(r"\[(\S+)==(\S+)\]", (ROOT / ".pre-commit-config.yaml").read_text())
    assert {name for name, _ in hooks} == {"ruff", "clang-format"}
    assert all(pins[name] == pinned for name, pinned in hooks)


def test_every_requirement_is_pinned():
    """All that is installed for tests stands in requirements/, with the version that is here."""
    pins = {}
    for path in (ROOT / "requirements").glob("*.txt"):
        for name, pinned in re.findall(r"^([\w.-]+)==([\w.]+)", path.read_text(), re.M):
            assert pins.setdefault(name, pinned) == pinned, f"{name} is pinned twice"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in chain(project["dependencies"], *project["optional-dependencies"].values()):
        name = re.match(r"[\w-]+", requirement)[0]
        assert metadata.version(name).partition("+")[0] == pins[name]


def test_help_waits_for_nothing():
    program = """
import sys
import ekfac_fast.cli
print(*{"torch", "numpy", "transformers"} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_every_public_name_is_there():
    for module in (ekfac_fast, ekfac_fast.data):
        for name in module.__all__:
            assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ekfac_fast.nothing  # noqa: B018
