"""CUDA graphs on the null device: operators are recorded while a stream captures, and run again at each replay.

As on a GPU, nothing that is captured has happened yet when the capture ends (results hold NaN until the first replay),
only work on the capturing device is recorded, and what would wait for the GPU is an error.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero")
_capturing = threading.local()


@contextmanager
def unseen(tensor: Tensor) -> Iterator[None]:
    """What is written within is not the program's own writing: autograd must not notice."""
    kept = nullcontext() if tensor.is_inference() else torch.autograd._unsafe_preserve_version_counter(tensor)
    with torch.no_grad(), kept:
        yield


def current() -> "Recording | None":
    """What this thread captures into."""
    return getattr(_capturing, "recording", None)


def refuse_waiting(what: str, recording: "Recording | None" = None) -> None:
    """Raises when this thread captures, or autograd's does for it: waiting for the GPU is not allowed then."""
    if recording or current():
        raise torch.AcceleratorError(f"CUDA error: operation not permitted when stream is capturing ({what})")


class Recording(TorchDispatchMode):
    """The operators of one graph, in order, each with the tensors that its first run returned."""

    def __init__(self, index: int):
        super().__init__()
        self.index = index
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor | None]]] = []

    def begin(self) -> None:
        if current():
            raise RuntimeError("this thread captures a graph already")
        _capturing.recording = self
        self.__enter__()

    def end(self) -> None:
        self.__exit__(None, None, None)
        _capturing.recording = None
        for _func, _args, _kwargs, made in self.calls:
            for tensor in made:
                if tensor is not None and tensor.is_floating_point():
                    with unseen(tensor):
                        tensor.fill_(float("nan"))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func._schema.name.split("::")[1]
        if name in WAITING and any(tensor.is_cuda for tensor in given):
            refuse_waiting(name, self)
        if name in ("copy_", "_to_copy", "_copy_from"):
            self._check_copy(name, given, kwargs)
        before = [tensor.clone() for tensor in self._written(func, args, kwargs)]
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        here = [t for t in given + outputs if t.is_cuda and t.device.index == self.index]
        if here:
            for tensor, value in zip(self._written(func, args, kwargs), before):
                with unseen(tensor):
                    tensor.copy_(value)
            known = {tensor.untyped_storage().data_ptr() for tensor in given}
            made = [None if tensor.untyped_storage().data_ptr() in known else tensor for tensor in outputs]
            self.calls.append((func, args, kwargs, made))
        return result

    @staticmethod
    def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
        """The arguments that an operator writes to."""
        written: list[Tensor] = []
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                written += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        return written

    def _check_copy(self, name: str, given: list[Tensor], kwargs: dict[str, Any]) -> None:
        """Between pageable memory and the GPU nothing can be captured."""
        target = kwargs.get("device")
        devices = {tensor.device.type for tensor in given} | ({torch.device(target).type} if target else set())
        on_cpu = [tensor for tensor in given if tensor.is_cpu]
        if devices == {"cpu", "cuda"} and not (on_cpu and all(tensor.is_pinned() for tensor in on_cpu)):
            refuse_waiting(f"{name} between the GPU and memory that is not pinned", self)

    def replay(self) -> None:
        """Runs all again, on the same memory."""
        with torch.inference_mode():
            for func, args, kwargs, made in self.calls:
                again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
                for tensor, value in zip(made, again):
                    if tensor is not None:
                        tensor.copy_(value)
