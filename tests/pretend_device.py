"""Harness: a device that is not there, and everything that goes to it, comes back or waits for it.

A backend of PyTorch's in Python: tensors of `device()` are no CPU tensors to anyone who asks, and
hold their values in one. The package runs on it unchanged, as on a GPU it has never heard of:
products of two devices are refused, backward hooks run in the device's own thread, and the numbers
are the CPU's. Kernels launched by hand (Triton, CUDA), streams and autocast are not on it.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

import ekfac_fast

PACKAGE, NAME = Path(ekfac_fast.__file__).parent, "pretend"
# Ops whose result, or its size, the host has to see before it can go on.
READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}
# Solvers: the host asks whether they converged.
SOLVERS = {"_linalg_eigh", "_linalg_svd", "linalg_qr", "linalg_lstsq"}
BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}


@dataclass(frozen=True)
class Event:
    """`kind`: "to" or "from" the device, `size` in bytes; or "wait" or "solve", for which the host
    stands still until the device has done all that it was given. `place`: the line that asked.
    """

    kind: str
    op: str
    place: str
    size: int = 0


@dataclass
class Traffic:
    """Events of every batch of each stage; a stage's first batch holds what came before it, `now`
    what came after the last.
    """

    stages: dict[str, list[list[Event]]] = field(default_factory=dict)
    now: list[Event] = field(default_factory=list)
    error: BaseException | None = None

    def batch_done(self, stage: str, done: int, total: int) -> None:
        """For `progress`, which is called after every batch."""
        self.stages.setdefault(stage, []).append(self.now)
        self.now = []

    def add(self, kind: str, op: str, size: int = 0) -> None:
        """Note an event, and where in the package it comes from."""
        self.now.append(Event(kind, op, _place(), size))


def told(events: list[Event]) -> str:
    """For an assertion: each kind of event, how often, and where from."""
    counts = Counter((e.kind, e.op, e.place) for e in events)
    return "\n" + "\n".join(f"{n} x {' '.join(event)}" for event, n in sorted(counts.items()))


@contextmanager
def watched() -> Iterator[Traffic]:
    """While it is entered, tensors can be made on the device, and its traffic is noted."""
    traffic = Traffic()
    device()
    with _Watching(traffic):
        _watching.append(traffic)
        # Lists that torch makes tensors of: on the CPU first, then in our sight.
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            yield traffic
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
            _watching.pop()
            if traffic.error is not None:
                raise traffic.error


@cache
def device() -> torch.device:
    """The device; torch knows it for the rest of the process, which has made no backward pass yet:
    autograd starts the threads of all devices at its first.
    """
    _setup_privateuseone_for_python_backend(NAME, _Backend())
    return torch.device(NAME, 0)


def moved(model: nn.Module) -> nn.Module:
    """`model` with its parameters and buffers on the device; shared ones stay shared."""
    done: dict[int, tuple[Tensor, Tensor]] = {}  # with what they were, so that ids stay theirs

    def there(x: Tensor) -> Tensor:
        if id(x) not in done:
            values = x.detach().to(device())
            own = isinstance(x, nn.Parameter)
            done[id(x)] = x, nn.Parameter(values, x.requires_grad) if own else values
        return done[id(x)][1]

    for module in model.modules():
        for table in (module._parameters, module._buffers):
            table |= {name: there(x) for name, x in table.items() if x is not None}
    return model


class _There(Tensor):
    """A tensor of the device."""

    values_there: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "_There":
        found = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            values.stride(),
            values.storage_offset(),
            dtype=values.dtype,
            device=device(),
        )
        found.values_there = values
        return found

    def tolist(self) -> list:
        """As for tensors that are of no subclass."""
        return self.cpu().tolist()

    def __getitem__(self, index: object) -> Tensor:
        """A list of indices is a tensor of the CPU's; torch would make it out of our sight."""
        return super().__getitem__(torch.tensor(index) if isinstance(index, list) else index)

    def register_hook(self, hook: Callable) -> object:
        """An error would end the process, not the pass: it is kept until the end."""

        def kept(g: Tensor) -> Tensor | None:
            try:
                return hook(g)
            except BaseException as error:
                _watching[-1].error = _watching[-1].error or error
                return None

        return super().register_hook(kept)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on {NAME}, and nobody watches: enter `watched`")


class _Watching(TorchDispatchMode):
    """Sees every call below autograd."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """The call on the values; its results are on the device where it says or its inputs are."""
        kwargs = kwargs or {}
        op, asked = func.__name__.partition(".")[0], kwargs.get("device")
        tensors: list[Tensor] = []
        _each((args, kwargs), lambda x: tensors.append(x))
        there = {id(x.values_there): x for x in tensors if isinstance(x, _There)}
        if op in ("_to_copy", "copy_"):
            target = torch.device(asked or args[0].device).type == NAME
            dtype = args[0].dtype if op == "copy_" else kwargs.get("dtype")
            self._copied(op, args[op == "copy_"], target, dtype, kwargs.get("non_blocking"))
        else:
            target = bool(there) if asked is None else torch.device(asked).type == NAME
            if there:
                self._used(op, tensors, args)
        if asked is not None:
            kwargs = kwargs | {"device": torch.device("cpu")}
        kwargs = {k: v for k, v in kwargs.items() if k not in ("pin_memory", "non_blocking")}
        args, kwargs = _each((args, kwargs), lambda x: getattr(x, "values_there", x))
        result = func(*args, **kwargs)
        if not target:
            return result
        # What was changed in place is itself.
        return _each(result, lambda x: there[id(x)] if id(x) in there else _There(x))

    def _copied(
        self, op: str, source: Tensor, target: bool, dtype: torch.dtype | None, going: bool | None
    ) -> None:
        """A copy; it travels in the dtype that it has on the device."""
        if target == isinstance(source, _There):
            return
        travels = dtype if target and dtype else source.dtype
        self.traffic.add("to" if target else "from", op, source.numel() * travels.itemsize)
        if not target and not going:
            self.traffic.add("wait", op)

    def _used(self, op: str, tensors: list[Tensor], args: tuple) -> None:
        """A call with tensors of the device: which of the others may be the CPU's."""
        here = [x for x in tensors if not isinstance(x, _There) and x.ndim]  # numbers go along
        if op in BY_INDEX:
            indices = [x for x in args[1] if x is not None]
            for x in indices:
                if not isinstance(x, _There):
                    self.traffic.add("to", op, x.numel() * x.element_size())
                if x.dtype in (torch.bool, torch.uint8):
                    self.traffic.add("wait", op)
            here = [x for x in here if all(x is not index for index in indices)]
        if here:
            shapes = [list(x.shape) for x in here]
            raise RuntimeError(f"{op}: tensors of {NAME}, and of the CPU: {shapes}")
        if op in READS:
            self.traffic.add("wait", op)
        elif op in SOLVERS:
            self.traffic.add("solve", op)


class _Backend(_DummyBackendModule):
    """What autocast asks for, where it is switched off."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """The CPU's."""
        return [torch.bfloat16, torch.float16]


_watching: list[Traffic] = []


def _each(x: Any, change: Callable[[Tensor], Any]) -> Any:
    """`change` of every tensor in a nest of arguments or results."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, dict):
        return {key: _each(value, change) for key, value in x.items()}
    return type(x)(_each(y, change) for y in x) if type(x) in (list, tuple) else x


def _place() -> str:
    """The innermost line of the package on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if path.is_relative_to(PACKAGE) and name != "__torch_function__":
            return f"{path.relative_to(PACKAGE)}:{frame.f_lineno} {name}"
        frame = frame.f_back
    return "elsewhere"
