"""Forward lowered in a forked process while backward is lowered here, so that a page keeps two cores busy.

Of forward's lowering, backward's needs the strides in which activations are saved. They are taken to be those of the
traced graph; where Inductor chose others, as it may for convolutions or to pad rows, the program must begin again.
"""

import contextvars
import inspect
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import wraps
from types import SimpleNamespace
from typing import Any, NoReturn

from torch._guards import TracingContext
from torch._inductor import compile_fx
from torch._inductor.codecache import PyCodeCache
from torch._inductor.graph import GraphLowering
from torch._inductor.output_code import OutputCode

from nanochat.processes import end_at_once, signal_with_parent

TRACEBACK = 2000  # characters of it that are reported, its last
Strides = list[tuple[int, ...] | None]


@dataclass
class Forward:
    """A lowered forward graph."""

    code: str  # of the wrapper
    inputs: list[str]
    constants: dict[str, Any]  # names that the code has beside its inputs
    traces: dict[str, list[str]]
    strides: Strides  # of what it returns


def fork_forward(
    load: Callable[[Any, Forward], Any], traces: dict[str, list[str]], begin_again: Callable[[], NoReturn]
) -> None:
    """Has Inductor lower every forward graph in a forked process; a thread loads its module and gives it to `load`.

    traces: which lowering fills. begin_again is called by a forward whose outputs have other strides than were assumed.
    What fails in the process is a RuntimeError of the forward that runs, with the last lines of its traceback.
    """
    compiler: Any = compile_fx._InProcessFxCompile
    lower = inspect.unwrap(compiler.codegen_and_compile)  # a process may prepare several programs

    @wraps(lower)
    def codegen_and_compile(self: Any, graph: Any, inputs: Any, checked: Any, options: Any) -> Any:
        def forward() -> Forward:
            return _lowered(lambda: lower(self, graph, inputs, checked, options), traces)

        def loaded(made: Forward) -> tuple[Strides, Any]:
            module = PyCodeCache.load_by_key_path(*PyCodeCache.write(made.code), linemap=[], attrs=made.constants)
            return made.strides, load(module, made)

        if options.get("is_backward") or options.get("is_inference"):
            return lower(self, graph, inputs, checked, options)
        return PendingForward(traced_strides(graph), forked(forward, loaded), begin_again)

    compiler.codegen_and_compile = codegen_and_compile


def traced_strides(graph: Any) -> Strides:
    """Of what a traced graph returns; None for what is no tensor."""
    values: list[Any] = [getattr(node, "meta", {}).get("val") for node in graph.graph.output_node().args[0]]
    return [tuple(value.stride()) if hasattr(value, "stride") else None for value in values]


def _lowered(lower: Callable[[], Any], traces: dict[str, list[str]]) -> Forward:
    """What the forked process does: all but loading the code, which its parent does."""
    made = Forward("", [], {}, traces, [])

    def written(self: Any) -> Any:
        made.code, made.inputs, made.constants = self.codegen()[0].value, list(self.graph_input_names), self.constants
        return SimpleNamespace(call=None)

    GraphLowering.compile_to_module = written  # type: ignore[method-assign]
    made.strides = [known and tuple(map(int, known)) for known in lower().output_strides]
    return made


class PendingForward(OutputCode):
    """Stands for the compiled forward, and waits for it when it is called."""

    def __init__(
        self, strides: Strides, future: "Future[tuple[Strides, Any]]", begin_again: Callable[[], NoReturn]
    ) -> None:
        self.strides, self.future, self.begin_again, self._boxed_call = strides, future, begin_again, True

    def post_compile(self, *args: Any) -> None:
        """Reports the outputs' strides to AOTAutograd, which lowers backward with them."""
        context = TracingContext.try_get()
        if context is not None and context.output_strides is not None:
            context.output_strides.extend(self.strides)

    def __call__(self, inputs: Any) -> Any:
        strides, module = self.future.result()
        if any(chosen not in (None, assumed) for chosen, assumed in zip(strides, self.strides, strict=True)):
            self.begin_again()
        return module.call(inputs)


def forked(make: Callable[[], Any], finish: Callable[[Any], Any]) -> "Future[Any]":
    """What `finish` returns, which a thread gives what `make` returned in a forked process (pickled).

    The future raises what `finish` raises, and RuntimeError where the process failed.
    """
    reading, writing = os.pipe()
    parent, child = os.getpid(), os.fork()
    if not child:
        os.close(reading)
        _answer(make, writing, parent)
    os.close(writing)
    future: Future[Any] = Future()

    def wait() -> None:
        with open(reading, "rb") as pipe:
            answer = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        try:
            if code:
                how = f"was ended by signal {-code}; was memory short?" if code < 0 else f"failed:\n{answer.decode()}"
                raise RuntimeError(f"the process that lowered the forward graph {how}")
            future.set_result(finish(pickle.loads(answer)))
        except BaseException as problem:
            future.set_exception(problem)

    # With what is set here: torch keeps the options of its compiler in context variables.
    threading.Thread(target=contextvars.copy_context().run, args=(wait,), daemon=True).start()
    return future


def _answer(make: Callable[[], Any], writing: int, parent: int) -> NoReturn:
    """The child's part: what was made, or why not. It ends with its parent, and without what that does at its end."""
    failed = True
    try:
        signal_with_parent(signal.SIGKILL)
        if os.getppid() != parent:
            end_at_once(SystemExit(1))
        answer, failed = pickle.dumps(make()), False
    except BaseException:
        answer = traceback.format_exc()[-TRACEBACK:].encode()
    try:
        with open(writing, "wb") as pipe:
            pipe.write(answer)
    finally:
        end_at_once(SystemExit(int(failed)))
