"""The manifest of a result folder: what it holds, from what it was made, how far it is."""

import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..checks import Whole, check_json
from ..errors import StoreError
from .files import load_json, save_json
from .fingerprint import brief, differences

FORMAT = 2
READABLE = (1, FORMAT)
MANIFEST = "manifest.json"
LOCK = ".lock"
ANY: Any = object
SCHEMA = {
    "kind": str, "format": Whole(1), "created": str, "versions": {str: str}, "facts": {str: ANY},
    "state": {str: ANY}, "finished": (str, None),
}  # fmt: skip
# Of what stages note, what is there; older versions kept one number of seconds.
STATE: dict[str, Any] = {
    "seconds": ({str: float}, float), "scan_seconds": float, "sequences": Whole(1),
    "truncated": Whole(), "without_targets": Whole(), "edge_draws": ({str: Whole()}, Whole()),
    "shared": {str: str}, "threads": Whole(1), "processes": Whole(1), "partitions": [[str]],
    "parameters": [Whole(1)], "keep_covariances": bool, "covariances": str,
    "asked": str, "validation": str, "files": {str: str},
    "trust": {"rank": (Whole(1), None), "energy": float, "least_damping": float,
              "most_damping": float, "refined": (str, None), "residual": (float, None)},
}  # fmt: skip


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read(folder: Path, kind: str | None) -> dict[str, Any]:
    """Read and check a manifest; raises StoreError."""
    path = folder / MANIFEST
    if not os.path.exists(path):  # of a path that cannot be, too
        raise StoreError(f"{folder}: no {MANIFEST} there, so no result of ours. Check the path")
    manifest = load_json(path)
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version not in READABLE:
        raise StoreError(
            f"{folder} has format {version}, this version of ekfac_fast reads {FORMAT}: "
            "use the version that wrote it, or choose another folder"
        )
    if version == FORMAT:
        load_json(path, ours=True)
    check_json(manifest, SCHEMA, path, "Choose another folder")
    told = {name: manifest["state"][name] for name in STATE if name in manifest["state"]}
    check_json(told, {name: STATE[name] for name in told}, path, "Choose another folder")
    if kind not in (None, manifest["kind"]):
        raise StoreError(f"{folder} holds {manifest['kind']!r}, not {kind!r}. Check the path")
    return manifest


def begin(folder: Path, kind: str, facts: dict[str, Any], processes: int = 1) -> dict[str, Any]:
    """The manifest of a locked folder: checked against the facts, or new."""
    if (folder / MANIFEST).exists():
        manifest = read(folder, None)
        if manifest["format"] != FORMAT:
            raise StoreError(
                f"{folder} was written by ekfac_fast {manifest['versions']['ekfac_fast']} in "
                f"format {manifest['format']}, whose results can be read but not continued: "
                "choose another folder, or delete this one"
            )
        stored = {"kind": manifest["kind"], **manifest["facts"]}
        if lines := list(differences(stored, {"kind": kind, **facts})):
            raise StoreError(
                f"{folder} holds the results of another run:\n"
                + "\n".join(lines)
                + "\nChoose another folder or delete this one"
            )
        return manifest
    # Results may stand in the folder of others.
    foreign = [
        path.name
        for path in folder.iterdir()
        if path.name != LOCK and not (path / MANIFEST).is_file()
    ]
    if foreign:
        raise StoreError(
            f"{folder} holds files ({brief(sorted(foreign))}) but no {MANIFEST}: it is not a "
            "result of ours. Choose an empty or a new folder"
        )
    manifest = {
        "kind": kind,
        "format": FORMAT,
        "created": now(),
        "versions": {
            "ekfac_fast": sys.modules["ekfac_fast"].__version__,
            "torch": torch.__version__,
        },
        "facts": facts,
        "state": {"threads": torch.get_num_threads(), "processes": processes},
        "finished": None,
    }
    save_json(folder / MANIFEST, manifest)
    return manifest
