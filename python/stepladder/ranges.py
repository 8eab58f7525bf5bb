"""Named ranges of a step, for profilers.

Where nobody listens, a range costs a look at two variables. While torch.profiler runs, ranges stand in its trace as
`stepladder::name`; `listening` has them told to somebody else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch.autograd import profiler

PREFIX = "stepladder::"

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Work:
    """What a kernel has to do at least.

    Attributes:
        bytes: Read and written.
        flops: Additions and multiplications of matrix products; a symmetric product counts as any other.
        precision: What the products' operands are rounded to: fp64, fp32 or bf16.
    """

    bytes: float = 0.0
    flops: float = 0.0
    precision: str | None = None


class Listener(Protocol):
    """Who is told of ranges as they begin and end."""

    def range(self, name: str, kernel: bool, work: Callable[[], Work] | None) -> AbstractContextManager[Any]:
        """A range in the calling thread. `work` may be called at any later time."""

    def workers(self) -> AbstractContextManager[Callable[[Function], Function]]:
        """The time in which other threads work for the open range.

        Its value makes of a function one that has a range of the same name in whichever thread calls it.
        """


_listener: Listener | None = None


def _as_it_is(function: Function) -> Function:
    return function


_NOTHING: AbstractContextManager[Any] = nullcontext()
_NO_WORKERS: AbstractContextManager[Any] = nullcontext(_as_it_is)


def phase(name: str) -> AbstractContextManager[Any]:
    """A part of a step that the host works through."""
    if _listener is None and not profiler._is_profiler_enabled:
        return _NOTHING
    return _opened(name, False, None)


def kernel(name: str, work: Callable[[], Work] | None = None) -> AbstractContextManager[Any]:
    """A part of a step that is arithmetic on tensors, or on a GPU launches it.

    Args:
        name: Of what is computed; ranges of one name are added up.
        work: What that takes at least; called only for a listener, and perhaps after the step.
    """
    if _listener is None and not profiler._is_profiler_enabled:
        return _NOTHING
    return _opened(name, True, work)


def workers() -> AbstractContextManager[Callable[[Function], Function]]:
    """The time in which other threads work for the open range; see `Listener.workers`."""
    return _NO_WORKERS if _listener is None else _listener.workers()


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Have a listener told of all ranges in this process."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


def _opened(name: str, is_kernel: bool, work: Callable[[], Work] | None) -> AbstractContextManager[Any]:
    if _listener is not None and not profiler._is_profiler_enabled:
        return _listener.range(name, is_kernel, work)
    return _recorded(name, is_kernel, work)


@contextmanager
def _recorded(name: str, is_kernel: bool, work: Callable[[], Work] | None) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch.profiler.record_function(PREFIX + name))
        if _listener is not None:
            stack.enter_context(_listener.range(name, is_kernel, work))
        yield
