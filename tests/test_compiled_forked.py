"""Forward lowered in a forked process: what it returns, and where it fails, is ended or chose other strides."""

import os
import signal
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from nanochat.processes import identity
from nanochat.recipe import model_config
from profiling.compiled import forked, generated, lower, null_device
from profiling.compiled.case import Case


def test_a_forked_process_makes_and_a_thread_of_this_one_finishes():
    made = forked.forked(os.getpid, lambda child: (child, os.getpid(), threading.get_ident()))
    child, here, thread = made.result(60)
    assert child != here == os.getpid() and thread != threading.get_ident()
    assert not identity(child)  # no zombie is left


def test_a_failure_is_said():
    with pytest.raises(RuntimeError, match="(?s)lowered the forward graph failed.*ZeroDivisionError"):
        forked.forked(lambda: 1 // 0, lambda answer: answer).result(60)
    with pytest.raises(RuntimeError, match="failed"):
        forked.forked(lambda: sys.exit(0), lambda answer: answer).result(60)
    with pytest.raises(RuntimeError, match="failed"):
        forked.forked(lambda: lambda: None, lambda answer: answer).result(60)  # which cannot be pickled
    with pytest.raises(RuntimeError, match="ended by signal 9; was memory short"):
        forked.forked(lambda: os.kill(os.getpid(), signal.SIGKILL), lambda answer: answer).result(60)
    with pytest.raises(KeyError, match="finish"):
        forked.forked(lambda: 1, lambda answer: {}["finish"]).result(60)
    assert forked.forked(lambda: None, lambda answer: answer).result(60) is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends it with its parent")
def test_it_ends_with_its_parent():
    reading, writing = os.pipe()
    parent = os.fork()
    if not parent:
        forked.forked(lambda: (os.write(writing, str(os.getpid()).encode()), time.sleep(600)), print)
        time.sleep(600)
        os._exit(0)
    child = int(os.read(reading, 32))
    begun = identity(child)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    for _ in range(200):
        if identity(child) != begun:
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("it goes on")


def test_strides_of_what_a_graph_returns():
    graph = torch.fx.Graph()
    known, unknown = graph.placeholder("known"), graph.placeholder("unknown")
    known.meta["val"] = torch.empty(3, 4).t()
    graph.output((known, unknown, None))
    assert forked.traced_strides(SimpleNamespace(graph=graph)) == [(1, 4), None, None]


@pytest.mark.parametrize("strides, again", [([(8, 1), None], 0), ([None, None], 0), ([(1, 8), None], 1)])
def test_other_strides_than_the_traced_graphs_begin_again(strides, again):
    begun, future = [], Future()
    future.set_result((strides, SimpleNamespace(call=sum)))
    forward = forked.PendingForward([(8, 1), (4,)], future, lambda: begun.append(1))
    context = torch._guards.TracingContext(None)
    context.output_strides = []
    with torch._guards.tracing(context):
        forward.post_compile(None, None, None)
    assert context.output_strides == [(8, 1), (4,)]
    assert forward([1, 2]) == 3 and len(begun) == again


def test_kernels_written_by_two_threads_are_all_asked_for_once(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    asked = []
    with generated.Compiler("sm_90") as compiler:
        monkeypatch.setattr(compiler.pool, "submit", lambda make, sources, target: asked.extend(sources))
        names = [f"triton_{i}" for i in range(400)]
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            threads = [
                threading.Thread(target=lambda: [compiler.written(name, f"def {name}(): {name[7:]}") for name in names])
                for _ in range(2)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(before)
    assert sorted(asked) == sorted((name, f"def {name}(): {name[7:]}") for name in names)


@pytest.mark.slow
def test_a_forward_that_fails_is_what_the_whole_program_says():
    pytest.importorskip("triton", reason="Triton is not installed")
    if reason := null_device.obstacle():
        pytest.skip(reason)
    case = Case(asdict(model_config(1, 512, 64)), rows=1, optimizer=False)
    with pytest.raises(RuntimeError, match="(?s)lowered the forward graph failed.*ZeroDivisionError"):
        lower.ask("tests.null_device.failing_forward", case, "h100")
