"""The shape of the house: who imports whom, one kernel per op and device, stems, sizes of files."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ekfac_fast import ops

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ekfac_fast"

# The floors, from the ground: a room may import from its own and from those before it. The drop-in
# backend stands beside the driver, on the ops and the mathematics.
FLOORS = (
    "errors", "extras", "lazy", "checks", "ops", "store", "data", "model", "curvature", "stages",
    "validation", "report", "studies", "cli",
)  # fmt: skip
BESIDE = {"kronfluence": {"errors", "checks", "ops", "curvature", "kronfluence"}}
# On the ground floor of the mathematics: tensors in, tensors out.
NARROW = {"curvature": {"errors", "ops", "curvature"}, "ops": {"ops"}, "errors": {"errors"}}
LIMIT = 400  # lines of a file


def imported(path: Path) -> Iterator[str]:
    """What a module of the package imports, absolute names; of `from x import y` both x and x.y."""
    here = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(here[: -node.level]) if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def modules() -> Iterator[tuple[str, Path]]:
    """(room, file) of everything in the package but its two front doors."""
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room not in ("__init__", "__main__"):
            yield room, path


def allowed(room: str) -> set[str]:
    """What a room may import from."""
    narrow = {**BESIDE, **NARROW}.get(room)
    return narrow if narrow is not None else {*FLOORS[: FLOORS.index(room) + 1]}


def test_no_arrow_runs_up():
    wrong = []
    for room, path in modules():
        for name in imported(path):
            root, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            if root in ("tests", "bench"):
                wrong.append(f"{path.name} imports {name}")
            if root == "ekfac_fast" and target not in ("", "__version__", *allowed(room)):
                wrong.append(f"{path.name} ({room}) imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_circle_between_files():
    arrows = {}
    for _, path in modules():
        names = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")}
        names |= {name.removesuffix(".__init__") for name in names}
        for name in names:
            arrows[name] = {*imported(path)} - names
    done: set[str] = set()

    def follow(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name in done or name not in arrows:
            return
        for target in sorted(arrows[name]):
            # `from . import x` names the room as well: its own door is no circle.
            if not name.startswith(f"{target}."):
                follow(target, (*way, name))
        done.add(name)

    for name in arrows:
        follow(name, ())


def test_every_room_has_a_floor_and_every_floor_a_room():
    assert {room for room, _ in modules()} == {*FLOORS, *BESIDE}


def test_the_mathematics_stands_once():
    """What `curvature` defines, nobody defines again."""
    defined: dict[str, set[str]] = {}
    for room, path in modules():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.setdefault(node.name.strip("_"), set()).add(room)
    twice = {n: rooms for n, rooms in defined.items() if "curvature" in rooms and len(rooms) > 1}
    assert not twice


def test_benches_do_not_import_tests():
    names = [name for path in (ROOT / "bench").rglob("*.py") for name in imported(path)]
    assert not [name for name in names if name.partition(".")[0] == "tests"]


def test_rooms_of_the_benches_know_what_stands_before_them():
    rooms = {"measure": {"measure"}, "ways": {"ways"}, "pages": {"measure", "ways", "pages"}}
    scripts = {path.stem for path in (ROOT / "bench").glob("*.py")}
    for room, allowed in rooms.items():
        for path in (ROOT / "bench" / room).glob("*.py"):
            names = (name.removeprefix("bench.") for name in imported(path))
            known = {name.partition(".")[0] for name in names} & {*rooms, *scripts}
            assert known <= allowed, path.name


def test_triton_kernels_know_torch_triton_and_each_other():
    allowed = {"torch", "triton", "triton_kernels"} | sys.stdlib_module_names
    for path in (ROOT / "triton_kernels").glob("*.py"):
        assert {name.partition(".")[0] for name in imported(path)} <= allowed, path.name


def test_cpp_knows_tensors_and_itself_and_pybind_only_binds():
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        includes = set(re.findall(r"#include [<\"](\S+)[>\"]", path.read_text()))
        assert "torch/extension.h" not in includes, f"{path.name}: 25 s a file; see design"
        python = {name for name in includes if name.startswith(("pybind11", "Python.h"))}
        assert not python or path.name == "bindings.cpp"
        own = re.findall(r"#include \"(\S+)\"", path.read_text())
        assert all((path.parent / name).is_file() for name in own), f"{path.name}: not csrc's"


def test_stems_are_complete_and_registered():
    stems = {ops.stem(card) for card in ops.ALL}
    cpp, python = (
        {
            path.stem: " ".join(path.read_text().split())
            for path in folder.iterdir()
            if path.suffix in (".cpp", ".py") and register in path.read_text()
        }
        for folder, register in (
            (ROOT / "csrc" / "cpu", "TORCH_LIBRARY_IMPL"),
            (ROOT / "triton_kernels", "@launcher"),
        )
    )
    small = (ROOT / "csrc" / "cuda" / "small.cpp").read_text()
    assert cpp.keys() == python.keys() == stems
    for stem in stems:
        impl = f'm.impl("{stem}", &ekfac_fast::cpu::{stem});'
        assert cpp[stem].endswith(f"TORCH_LIBRARY_IMPL(ekfac_fast, CPU, m) {{ {impl} }}")
        assert python[stem].count("@launcher") == python[stem].count(f"@launcher def {stem}(") == 1
        assert f'm.impl("{stem}", &{stem}<false>);' in small


@pytest.mark.parametrize("card", ops.ALL, ids=ops.stem)
def test_one_kernel_per_op_and_device(card):
    registered = torch._C._dispatch_dump(f"ekfac_fast::{ops.stem(card)}")
    assert "(inactive)" not in registered
    keys = re.findall(r"^(\w+)(?:\[alias\])?: registered", registered, re.MULTILINE)
    assert set(keys) >= {"CPU", "CompositeExplicitAutograd"}
    assert len(keys) == len(set(keys))


def test_a_second_kernel_would_be_seen():
    program = """
import torch, ekfac_fast.ops
torch.library.impl("ekfac_fast::covariance", "default", lambda *args: None)
print(torch._C._dispatch_dump("ekfac_fast::covariance"))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True
    )
    assert "(inactive)" in done.stdout, done.stderr


def test_cards_say_the_same_things_in_the_same_order():
    for card in ops.ALL:
        tree = ast.parse(Path(card.__file__).read_text())
        names = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
        assert [n for n in names if n != "laid_out"] == ["reference", "samples", "cost"]
        assert card.SCHEMA
        assert ast.get_docstring(tree).splitlines()[0].rstrip(".")


def test_files_stay_short():
    folders = ("bench", "csrc", "ekfac_fast", "examples", "tests", "triton_kernels")
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in folders
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".py", ".cpp", ".h", ".css", ".js", ".j2")
        and (lines := len(path.read_text().splitlines())) > LIMIT
    }
    assert not long


def test_the_bare_name_of_the_triton_kernels_is_refused():
    done = subprocess.run(
        [sys.executable, "-c", "import triton_kernels"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode
    assert "ImportError: this folder is `ekfac_fast.triton_kernels`" in done.stderr
