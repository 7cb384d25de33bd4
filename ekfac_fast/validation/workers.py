"""Trainings of a bank, here or in processes of their own."""

import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError, StoreError

Train = Callable[[Any, int], Any]
# (indices, seed) of a run by its number.
Jobs = Mapping[int, tuple[np.ndarray, int]]
_held: list[Any] = []


def outcomes(
    jobs: Jobs, train: Train, measure: Callable[[Any], Any], processes: int
) -> Iterator[tuple[int, Any, float]]:
    """(number, what `measure` says of the trained model, seconds) of every run as it ends.

    Raises:
        ArgumentError: the functions cannot be sent to other processes.
        StoreError: a process ended by itself.
    """
    if processes == 1 or len(jobs) < 2:
        for number, job in jobs.items():
            yield (number, *_one(train, measure, *job))
        return
    try:
        sent = pickle.dumps((train, measure))
    except Exception as error:  # whatever an object's own pickling raises
        raise ArgumentError(
            f"train or measure cannot be sent to {processes} processes ({error}): define them at "
            "the top of a module, or give processes=1"
        ) from error
    pool = ProcessPoolExecutor(
        min(processes, len(jobs)),
        get_context("spawn"),
        initializer=_begin,
        initargs=(sent, torch.get_num_threads()),
    )
    try:
        numbers = {pool.submit(_sent, *job): number for number, job in jobs.items()}
        for future in as_completed(numbers):
            yield (numbers[future], *future.result())
    except BrokenProcessPool as error:
        raise StoreError(
            f"a process that trained ended by itself ({error}), for want of memory perhaps. What "
            "was finished is kept: start again, with fewer processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _one(
    train: Train, measure: Callable[[Any], Any], indices: np.ndarray, seed: int
) -> tuple[Any, float]:
    start = time.perf_counter()
    values = measure(train(indices, seed))
    return values, time.perf_counter() - start


def _begin(sent: bytes, threads: int) -> None:
    """In a process of its own."""
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)  # killed, it cannot end its children

    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(threads)
    _held[:] = pickle.loads(sent)


def _sent(indices: np.ndarray, seed: int) -> tuple[Any, float]:
    train, measure = _held
    values, seconds = _one(train, measure, indices, seed)
    if isinstance(values, Tensor):  # by value: PyTorch would send a file handle
        values = values.detach().cpu().double().numpy()
    return values, seconds
