"""How a model is held while a pass of ours runs through it."""

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..ops.products import products_for
from .spread import offloaded

_locks: "weakref.WeakKeyDictionary[nn.Module, threading.RLock]" = weakref.WeakKeyDictionary()
_locks_lock = threading.Lock()


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """One pass at a time through a model, in evaluation mode, its parameters frozen.

    Hooks and modes are the model's own: two threads would get each other's. Linear layers run on
    the fastest product, see `products`.
    """
    with _locks_lock:
        lock = _locks.setdefault(model, threading.RLock())
    with lock, _frozen(model), products_for(model):
        yield


@contextmanager
def restored(weights: Iterable[Tensor]) -> Iterator[None]:
    """Whatever is done to weights meanwhile, afterwards they are bitwise what they were."""
    weights = list(weights)
    before = [w.detach().clone() for w in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for w, was in zip(weights, before, strict=True):
                w.copy_(was)


@contextmanager
def gradients_on() -> Iterator[None]:
    """Gradients on, whatever the caller has switched off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; every module is afterwards in the mode that it was in."""
    training = [m for m in model.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires grad, and the model is in evaluation mode; both are restored."""
    required = [p for p in model.parameters() if p.requires_grad]
    # What is offloaded is another tensor each time that it comes.
    coming = [name for name in offloaded(model) if model.get_parameter(name).requires_grad]
    for p in required:
        p.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for p in (*required, *map(model.get_parameter, coming)):
            p.requires_grad_(True)
