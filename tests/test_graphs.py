"""CUDA graphs without a GPU: torch's own torch.cuda.graph and stream contexts on a stand-in for what lies below them.
What a graph would do is done by running its step again, on the CPU.
"""

import json
import os
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

from benchmarks import timer
from kernels import traffic, triton_utils, use
from kernels.attention import triton_decode
from nanochat import capture, replay
from nanochat.engine import Engine, Request, Sampling
from nanochat.engine import graphs as engine_graphs
from nanochat.engine.cache import Slots
from nanochat.engine.decode import Decoder
from nanochat.engine.engine import KINDS, PREFILLS
from nanochat.engine.graphs import WARM, Graphs
from nanochat.engine.sampling import moved

WHERE = ["begin", "start", "body", "end", "memory"]  # where capturing fails


class Stream:
    """Each card's first stream is the default one."""

    device_type = 1

    def __init__(self, cards, device):
        self.device = torch.device("cuda", cards.current_device() if device is None else torch.device(device).index)
        self.device_index = self.device.index
        self.stream_id = next(cards.ids)
        cards.streams[self.stream_id] = self

    def wait_stream(self, other):
        assert other.device == self.device


class Graph:
    """Notes on which card and stream it was captured and replayed."""

    cards: "Cards"
    ended = False

    def __del__(self):
        if self.ended:
            self.cards.holds.subtract([(self.device, *self.of)])

    def pool(self):
        if not self.ended:
            raise RuntimeError("without a preceding successful capture")
        return self.of[0]

    def capture_begin(self, *pool, **options):
        cards = self.cards
        cards.failing("begin")
        assert cards.capturing is None, "two captures at a time"
        assert options["capture_error_mode"] == "thread_local"
        self.of, self.device = pool, cards.current_device()
        cards.underway.append((self.device, *pool))
        cards.holds.update(cards.underway[-1:])
        cards.failing("start")
        cards.capturing = self
        self.stream = torch.cuda.current_stream()
        time.sleep(0.01)  # for another thread to begin one too

    def capture_end(self):
        self.cards.capturing = None
        self.cards.failing("end")
        if self.cards.fails == "body":
            raise RuntimeError("the capture is not valid any more, as an operation was not permitted at the body")
        self.cards.end_allocate(self.device, *self.of)
        self.ended = True

    def replay(self):
        assert self.cards.capturing is not self
        owner = next(graphs for graphs in self.cards.all if any(made[1] is self for made in graphs._made.values()))
        static, _, logits = next(made for made in owner._made.values() if made[1] is self)
        self.cards.replays.append((self, self.cards.current_device()))
        logits.copy_(owner._run(static))


class Cards:
    """Two GPUs: the current one and the current stream of each, by thread."""

    def __init__(self, monkeypatch):
        self.ids, self.streams, self.here = iter(range(1000)), {}, threading.local()
        self.defaults = [Stream(self, f"cuda:{i}") for i in range(2)]
        self.capturing, self.fails, self.all, self.replays, self.runs = None, "", [], [], []
        self.underway = []  # captures that the allocator knows of
        self.holds, self.emptied = Counter(), []  # of each pool, and those when the cache was emptied after a failure
        cards = self

        class device:
            def __init__(self, device):
                self.index = torch.device(device).index

            def __enter__(self):
                self.before, cards.here.device = cards.current_device(), self.index

            def __exit__(self, *_):
                cards.here.device = self.before

        def set_stream_by_id(stream_id, device_index, device_type):
            cards.here.device = device_index
            cards.of_thread()[device_index] = cards.streams[stream_id]

        for name, value in dict(
            device=device, Stream=lambda device=None: Stream(cards, device), CUDAGraph=type("CUDAGraph", (Graph,),
            dict(cards=self)), current_device=self.current_device, current_stream=self.current_stream,
            synchronize=lambda *_: None, graph_pool_handle=object,
            empty_cache=lambda: self.emptied.append(self.holds.total()),
            _get_device_index=lambda *_: self.current_device(), _set_stream_by_id=set_stream_by_id,
        ).items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)
        monkeypatch.setattr(capture, "_STREAMS", capture._Streams())
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocate, raising=False)
        monkeypatch.setattr(capture, "KEEPS_POOL", True)
        release = lambda *pool: self.holds.subtract([pool])
        monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)

    def end_allocate(self, device, pool):
        if (device, pool) not in self.underway:
            raise RuntimeError("not currently recording to mempool_id")
        self.underway.remove((device, pool))

    def current_device(self):
        return getattr(self.here, "device", 0)

    def of_thread(self):
        if not hasattr(self.here, "streams"):
            self.here.streams = list(self.defaults)
        return self.here.streams

    def current_stream(self, device=None):
        return self.of_thread()[self.current_device() if device is None else torch.device(device).index]

    def failing(self, where):
        if self.fails in (where, "memory"):
            self.emptied.clear()
        if self.fails == "memory" and where == "body":
            raise torch.OutOfMemoryError("out of memory, not permitted at the memory")  # the capture itself is valid
        if self.fails == where:
            raise RuntimeError(f"operation not permitted at the {where}\nmore about it")

    def graphs(self, model, slots, card):
        """Graphs that take the CPU's tensors for a card's."""
        made = Graphs(model, slots)
        made.device, made.problem = torch.device("cuda", card), ""
        inner = made._run

        def run(static):
            self.runs.append((made, static.rows, self.current_device(), self.current_stream(), id(self.capturing)))
            if self.capturing is not None:
                self.failing("body")
            return inner(static)

        made._run = run
        self.all.append(made)
        return made


@pytest.fixture
def cards(monkeypatch):
    return Cards(monkeypatch)


def slots_of(model, count, lengths):
    """A cache that holds so many random tokens a row, and the tokens."""
    slots = Slots(model.config, count, torch.device("cpu"), torch.float32)
    ids = torch.randint(300, (count, model.config.sequence_len), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        for row, length in enumerate(lengths):
            view = slots.view(row, row + 1, length)
            model.hidden(ids[row : row + 1, :length], view)
            view.advance()
    return slots, ids


def test_replicas_capture_and_replay_each_on_its_card(cards):
    model, errors = tiny.model(), []
    logits = {}

    def replica(card):
        try:
            with torch.inference_mode():
                slots, ids = slots_of(model, 4, [5, 3, 9])
                graphs = cards.graphs(model, slots, card)
                torch.cuda._set_stream_by_id(cards.defaults[0].stream_id, 0, 1)  # the thread is on the first card
                graphs.warm()
                assert sorted(graphs._made) == [1, 2, 4]
                logits[card] = [graphs(ids[: len(slots.lengths) - 1, n].tolist()).clone() for n in (20, 21)]
                assert cards.current_device() == 0 and cards.of_thread() == cards.defaults
        except BaseException as problem:
            errors.append(problem)
            raise

    threads = [threading.Thread(target=replica, args=(card,)) for card in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for card, graphs in enumerate(sorted(cards.all, key=lambda graphs: graphs.device.index)):
        captured = [made[1] for made in graphs._made.values()]
        for graph in captured:
            assert graph.device == card == graph.stream.device.index
            assert graph.stream is captured[0].stream is not cards.defaults[card]
            assert graph.of == (graphs.pool,)
        assert [made.device for made, _ in cards.replays if made in captured] == [card, card]
        assert all(device == card for graph, device in cards.replays if graph in captured)
        warmed = [run for run in cards.runs if run[0] is graphs and run[1] == 4][: WARM + 1]
        assert all(device == card and stream is captured[0].stream for _, _, device, stream, _ in warmed)
        assert [run[4] in map(id, captured) for run in warmed] == [False] * WARM + [True]
    slots, ids = slots_of(model, 4, [5, 3, 9])
    with torch.inference_mode():
        step = Decoder(model, slots)
        exact = [step(ids[:3, n].tolist()) for n in (20, 21)]
    for found in logits.values():
        assert all((a - b).abs().max() < 1e-4 for a, b in zip(found, exact))


def test_all_that_a_thread_captures_is_on_one_stream_a_card(cards):
    """cuBLAS keeps a workspace for each stream: with one for each engine, every sampling in training left one."""
    model, made = tiny.model(), []

    def two_engines():
        for card in (1, 1, 0):
            with torch.inference_mode():
                graphs = cards.graphs(model, slots_of(model, 1, [5])[0], card)
                graphs.warm()
            made.append(graphs._made[1][1].stream)

    two_engines()
    thread = threading.Thread(target=two_engines)
    thread.start()
    thread.join()
    assert made[0] is made[1] and made[3] is made[4]
    assert len({stream.stream_id for stream in made}) == 4


@pytest.mark.parametrize("where", WHERE)
def test_where_capturing_fails_decoding_goes_on_without(cards, where):
    model = tiny.model()
    slots, ids = slots_of(model, 4, [5, 3, 9])
    graphs = cards.graphs(model, slots, 1)
    step = Decoder(model, slots_of(model, 4, [5, 3, 9])[0])
    with torch.inference_mode():
        kept = slots.previous.clone()
        graphs([1])  # works: its graph stays
        slots.lengths[0] -= 1
        slots.previous.copy_(kept)
        cards.fails = where
        with pytest.warns(UserWarning, match=f"cuda:1 without CUDA graphs: .* not permitted at the {where}$"):
            found = graphs(ids[:3, 20].tolist())
        assert (found - step(ids[:3, 20].tolist())).abs().max() < 1e-4
        assert cards.of_thread() == cards.defaults and cards.current_device() == 0 and not cards.underway
        assert graphs.problem and graphs._made[4][1] is None and graphs._made[1][1] is not None
        assert cards.holds.total() == cards.emptied[-1] == 1  # the first graph's: nothing more is reserved
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once
            found = graphs(ids[:2, 21].tolist())
        assert (found - step(ids[:2, 21].tolist())).abs().max() < 1e-4


@pytest.mark.parametrize("where", WHERE)
def test_a_benchmark_that_cannot_be_captured_leaves_nothing_behind(cards, where):
    cards.fails = where
    with pytest.raises(RuntimeError, match=f"not permitted at the {where}"):
        timer.replayed(lambda: lambda: cards.capturing and cards.failing("body"))
    assert cards.of_thread() == cards.defaults and cards.capturing is None and not cards.underway
    assert cards.holds.total() == 0


@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize("where", ["body", "memory"])
def test_where_a_step_cannot_be_captured_its_memory_is_given_back(cards, part, where):
    """Both graphs', and only when nothing holds them any more; steps go on as they are."""
    cards.fails = where
    weight = torch.ones(4, requires_grad=True)

    def model(inputs, targets, loss_reduction):
        y = weight * inputs
        if part == "backward":
            y.register_hook(lambda grad: cards.capturing and cards.failing("body"))
        elif cards.capturing:
            cards.failing("body")
        return y.sum()

    optimizer = SimpleNamespace(forget_shadows=lambda: None)
    run = replay.Replayed(model, optimizer, torch.device("cpu"), lambda: True)
    for call in range(4):
        with pytest.warns(UserWarning, match="not permitted at the") if call == replay.PLAIN else nullcontext():
            run(torch.ones(4), torch.ones(4), "sum").backward()
    assert run.problem and cards.holds.total() == cards.emptied[-1] == 0 and weight.grad.tolist() == [4.0] * 4


def test_what_torch_lets_go_itself_is_not_let_go_twice(cards, monkeypatch):
    """It would be taken from another graph of the pool."""
    monkeypatch.setattr(capture, "KEEPS_POOL", False)
    cards.fails = "body"
    with pytest.raises(RuntimeError, match="at the body"):
        timer.replayed(lambda: lambda: cards.capturing and cards.failing("body"))
    assert cards.holds.total() == 1


@pytest.mark.skipif(not hasattr(torch._C, "_override_stale_capture_stream"), reason="torch before 2.13")
@pytest.mark.parametrize("where", ["", "body"])
def test_while_it_captures_autograd_stays_on_that_stream(cards, where):
    cards.fails, seen = where, []

    def call():
        seen.append((cards.capturing is not None, torch._C._override_stale_capture_stream()))
        if cards.capturing:
            cards.failing("body")

    with pytest.raises(RuntimeError) if where else nullcontext():
        capture.captured(lambda: call, object(), warm=1)
    assert seen == [(False, False), (True, True)] and not torch._C._override_stale_capture_stream()


def test_numbers_reach_a_card_from_pinned_memory_and_nobody_waits(monkeypatch):
    class Made:
        def __init__(self, values, dtype, pin_memory):
            self.pinned = pin_memory

        def to(self, device, non_blocking):
            return self.pinned, non_blocking

    monkeypatch.setattr(torch, "tensor", Made)
    found = {device: moved([1], torch.int64, torch.device(device)) for device in ("cuda:1", "mps", "cpu")}
    assert found == {"cuda:1": (True, True), "mps": (False, False), "cpu": (False, False)}


# ---- idle rows


def test_an_idle_row_writes_at_the_end_and_sees_one_key(monkeypatch):
    model, seen = tiny.model(sequence_len=300), []
    plain = engine_graphs.flash_attention_decode
    watch = lambda q, k, v, start, window: seen.append(start.tolist()) or plain(q, k, v, start, window=window)
    monkeypatch.setattr(engine_graphs, "flash_attention_decode", watch)
    answers, ends = [], []
    for filled in (0.0, 7.0):
        slots, ids = slots_of(model, 4, [50, 3, 290])
        with torch.inference_mode():
            graphs = Graphs(model, slots)
            graphs._get(4)
            slots.k[:, 3, 1:], slots.v[:, 3, 1:] = filled, -filled  # what a request that is over has left
            before = slots.k.clone()
            seen.clear()
            answers.append(graphs(ids[:3, 295].tolist()))
        assert seen == [[50, 3, 290, 0]] * model.config.n_layer
        changed = (slots.k != before).any(-1).any(-1).any(0)  # (slots, S)
        assert [row.nonzero().flatten().tolist() for row in changed] == [[50], [3], [290], [299]]
        ends.append(slots.k[:, 3, 299])
    assert torch.equal(*answers) and torch.equal(*ends)  # of the idle row's cache, one key counts


@pytest.mark.skipif(not triton_utils.INTERPRETED, reason="counts what the interpreter runs: no Triton here, or a GPU")
@pytest.mark.parametrize("splits", [1, 5])
def test_no_key_is_read_for_an_idle_row(splits, monkeypatch):
    monkeypatch.setattr(triton_decode, "split_count", lambda *_: splits)
    model = tiny.model(sequence_len=300, window_pattern="L")
    slots, ids = slots_of(model, 4, [50, 3])
    graphs = Graphs(model, slots)
    with torch.inference_mode():
        graphs._get(2), graphs._get(4)
        slots.lengths[2] = 200
        counts = []
        for rows in (2, 3):
            with use("torch,flash_attention_decode=triton"), traffic.counting() as counted:
                graphs(ids[:rows, 20].tolist())
            slots.lengths[:3] = [50, 3, 200]
            counts.append(counted.flops)
    L, K, tile = model.config.n_layer, model.config.n_kv_head, 2 * 2 * 16 * 16 * 16  # two products of 16·16·16
    needed = lambda keys: L * K * tile * -(-keys // 16)
    assert counts == [needed(51) + needed(4), needed(51) + needed(4) + needed(201) + needed(1)]


# ---- warm


class Shapes:
    """What a model's hidden() was called with."""

    def __init__(self, model):
        self.inner, self.seen = model.hidden, []

    def __call__(self, idx, cache=None):
        self.seen.append((tuple(idx.shape), cache.start.tolist()))
        return self.inner(idx, cache)


def test_a_warm_engine_has_met_everything_and_keeps_nothing():
    model = tiny.model(sequence_len=200)
    engine = Engine(model, slots=6)
    engine._decode = Graphs(model, engine.slots)
    model.hidden = shapes = Shapes(model)
    engine.warm()
    prefills = [shape[1] for shape, start in shapes.seen if shape[1] > 1 or start == [0]]
    assert {*PREFILLS, 198} <= set(prefills) and {rows for (rows, T), _ in shapes.seen if T == 1} >= {1, 2, 4, 6}
    assert len(KINDS) == len(PREFILLS) + 1 and engine.idle and engine.decoding == "eager"
    assert engine.slots.lengths == [0] * 6 and engine.slots.tokens == [[]] * 6
    prompts = [[0, 0, 0, 5], [1, 0, 0], [2] * 5]  # as those that it was warmed with begin
    requests = [Request(prompt, 12, Sampling(0.9, 20, seed=i)) for i, prompt in enumerate(prompts)]
    fresh = Engine(tiny.model(sequence_len=200), slots=6)
    answers = []
    for one in (engine, fresh):
        asked = [one.submit(Request(r.prompt, r.max_tokens, r.sampling)) for r in requests]
        while not one.idle:
            one.step()
        assert [request.cached for request in asked] == [0, 0, 0]
        answers.append([request.output for request in asked])
    assert answers[0] == answers[1]


@pytest.mark.slow
@pytest.mark.skipif(not triton_utils.INSTALLED, reason="Triton is not installed, so nothing is specialized")
def test_no_request_compiles_what_warm_has_not():
    """Every prompt length and number of rows finds the forms of arguments that Triton has compiled for already."""
    here = Path(__file__).parent
    environment = {
        key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "NANOCHAT_KERNELS")
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])
    made = subprocess.run(
        [sys.executable, str(here / "specializations.py")], capture_output=True, text=True, env=environment
    )
    assert made.returncode == 0, made.stderr[-2000:]
    found = json.loads(made.stdout)
    assert not found["new"]
    assert found["met"]["_decode_kernel"] == 4 and found["met"]["_prefill_kernel"] == 2  # with and without a window
    assert found["met"]["_combine_kernel"] == 1 and max(found["met"].values()) <= 12
