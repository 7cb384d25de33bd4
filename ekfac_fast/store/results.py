"""Whether the files of a finished folder are those that its run has written."""

from collections.abc import Collection

from ..errors import StoreError
from .files import mark_of
from .folder import Store


def check_result(store: Store, name: str) -> None:
    """StoreError where one of a finished folder's results is not the file that was written; one
    without a checksum of ours is whoever's put it there: kronfluence's, say.
    """
    path, noted = store.folder / name, store.state.get("files", {}).get(name)
    if store.finished and noted and (found := mark_of(path)) not in ("", noted):
        raise StoreError(
            f"{path} is not the file that this run wrote (checksum {found}, the manifest says "
            f"{noted}): it is another run's, or the manifest is. Put the folder's own back, or "
            "delete the folder and run again"
        )


def check_results(store: Store, but: Collection[str] = ()) -> None:
    """StoreError where a finished folder lacks a result, or has another run's; asked of the first
    process, which writes them.
    """
    if not store.finished or store.process:
        return
    for name in store.state.get("files", {}):
        if name in but:
            continue
        if not (store.folder / name).exists():
            raise StoreError(
                f"{store.folder} is finished, but {name} is gone: put it back, or delete the "
                "folder and run again"
            )
        check_result(store, name)
