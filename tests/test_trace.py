"""Traces made by hand, whose answers are known exactly; a real one of the CPU; and what is no trace."""

import gzip
import json
import os
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile, record_function

from nanochat.errors import UserError
from profiling.recorded import costs, trace
from profiling.recorded.analysis import VERSION, Analysis, analyse
from profiling.recorded.trace import both, gaps, length, owners, parse, read, self_spans, union

GEMM, NORM, REDUCE = "nvjet_tst_128x256", "triton_red_fused_rms_norm_0", "ncclDevKernel_AllReduce_Sum_bf16_RING_LL"


def event(name, kind, start, end, tid=1, **args):
    """Times in microseconds, as in a trace."""
    return dict(ph="X", cat=kind, name=name, ts=start, dur=end - start, pid=1, tid=tid, args=args)


def kernel(name, start, end, stream=7, launched=None, **args):
    """A kernel, and the call that launched it (default: 5 µs before it started)."""
    at = start - 5 if launched is None else launched
    number = kernel.number = getattr(kernel, "number", 0) + 1
    return [
        event("cudaLaunchKernel", "cuda_runtime", at, at + 2, correlation=number),
        event(name, "kernel", start, end, stream, correlation=number, stream=stream, **args),
    ]


def step(start, end, number=1):
    return event(f"ProfilerStep#{number}", "user_annotation", start, end)


def mark(name, start, end):
    return event(name, "user_annotation", start, end)


def analysed(*events, **about):
    flat = [e for entry in events for e in (entry if isinstance(entry, list) else [entry])]
    return analyse(parse(dict(traceEvents=flat, **about)))


# ---- intervals


spans = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 30)).map(lambda p: (p[0], p[0] + p[1])), max_size=12)


@given(spans, spans)
def test_interval_arithmetic_is_that_of_sets(a, b):
    one, two = ({i for s, e in x for i in range(s, e)} for x in (a, b))
    a, b = union(a), union(b)
    assert length(a) == len(one) and length(both(a, b)) == len(one & two)
    assert {i for s, e in gaps(a, (0, 140)) for i in range(s, e)} == set(range(140)) - one


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40), st.integers(0, 2)), max_size=10))
def test_every_instant_has_one_owner_of_the_lowest_rank(raw):
    spans = [(start, start + took, rank) for start, took, rank in raw]
    shares = list(owners(spans, (5, 90)))
    assert [s for s, _, _ in shares] + [90] == [5] + [e for _, e, _ in shares]
    for start, end, i in shares:
        running = [rank for s, e, rank in spans if s <= start and end <= e]
        assert (i is None) == (not running)
        if i is not None:
            assert spans[i][2] == min(running) and spans[i][0] <= start < end <= spans[i][1]


def test_nested_operators_keep_their_own_time_only():
    listed = [("linear", 0, 100), ("t", 5, 10), ("addmm", 20, 90), ("copy_", 30, 40), ("next", 100, 120)]
    events = [trace.Event(name, "cpu_op", s, e, (1, 1)) for name, s, e in listed]
    events.append(trace.Event("elsewhere", "cpu_op", 50, 60, (1, 2)))  # another thread: no child of addmm
    own = dict.fromkeys((e.name for e in events), 0)
    for start, end, i in self_spans(events):
        own[events[i].name] += end - start
    assert own == dict(linear=25, t=5, addmm=60, copy_=10, next=20, elsewhere=10)


# ---- a device


def test_overlapping_streams_count_an_instant_once():
    found = analysed(
        step(0, 1000),
        mark("forward", 0, 500),
        mark("backward", 500, 1000),
        kernel(GEMM, 100, 400),
        kernel(NORM, 350, 450, stream=8),  # 50 µs beside the product
        kernel(REDUCE, 300, 600, stream=9),  # exposed from 450 on
        event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 550, 700, 10),  # the last 100 µs alone
    )
    assert found.on_device and found.wall_ns == 1_000_000 and found.step_ns == [1_000_000]
    assert found.category_ns == {
        costs.PRODUCTS: 300_000,
        costs.STREAMING: 50_000,
        costs.COMMUNICATION: 150_000,
        costs.COPIES: 100_000,
    }
    assert found.idle_ns == 400_000
    said = found.communication
    assert (said["total_ns"], said["exposed_ns"], said["overlapped_ns"]) == (300_000, 150_000, 150_000)
    sums = {row["name"]: row["ns"] for row in found.ops}
    assert sums[NORM] == 100_000  # the kernel's own time is whole
    assert found.phase_ns["forward"][costs.PRODUCTS] == 300_000


def test_phase_is_that_of_the_launch_and_the_optimizer_owns_what_it_computes():
    found = analysed(
        step(0, 100),
        mark("forward", 0, 20),
        mark("backward", 20, 40),
        mark("optimizer", 40, 60),
        kernel(GEMM, 30, 50, launched=10),
        kernel(GEMM, 50, 70, launched=30),
        kernel(GEMM, 70, 110, launched=50),  # ends after the last step did: the window ends with it
        kernel(REDUCE, 80, 110, stream=9, launched=55),
    )
    assert found.wall_ns == 110_000
    assert found.phase_ns == dict(
        forward={costs.PRODUCTS: 20_000},
        backward={costs.PRODUCTS: 20_000},
        optimizer={costs.OPTIMIZER: 40_000, costs.COMMUNICATION: 0},
    )


def test_shapes_give_flops_and_bytes_once_per_operator():
    shapes = {"Input Dims": [[8, 16], [16, 32]], "Input type": ["c10::BFloat16", "c10::BFloat16"]}
    fused = {"Input Dims": [[64, 32], [64, 32], []], "Input type": ["float", "c10::BFloat16", "Scalar"]}
    found = analysed(
        step(0, 100),
        event("aten::mm", "cpu_op", 1, 9, **{"External id": 3, **shapes}),
        event(NORM, "cpu_op", 10, 12, **{"External id": 4, **fused}),
        kernel(GEMM, 10, 30, **{"External id": 3}),
        kernel("cublasLt::splitKreduce_kernel", 30, 32, **{"External id": 3}),  # of the same product
        kernel(NORM, 40, 50, **{"External id": 4}),
    )
    flops = 2 * 8 * 16 * 32
    rows = {row["name"]: row for row in found.ops}
    assert (rows[GEMM]["flops"], rows[GEMM]["flops_ns"]) == (flops, 22_000)  # the product took both kernels
    assert rows[GEMM]["bytes"] == 2 * (8 * 16 + 16 * 32 + 8 * 32)
    assert rows["cublasLt::splitKreduce_kernel"]["flops"] == 0
    assert rows[GEMM]["bytes_ns"] == 22_000
    assert rows[NORM]["bytes"] == 64 * 32 * 6
    assert found.products == dict(flops=flops, fp8_flops=0, known_ns=22_000, unknown_ns=0)


def test_what_lies_outside_of_the_marked_steps_is_not_counted():
    shapes = {"Input Dims": [[8, 16], [16, 32]], "Input type": ["c10::BFloat16", "c10::BFloat16"]}
    listed = [
        step(100, 200),
        *(event("aten::mm", "cpu_op", at, at + 2, **{"External id": i, **shapes}) for i, at in enumerate((1, 60, 110))),
        *kernel(GEMM, 10, 40, **{"External id": 0}),  # before the first step
        *kernel(GEMM, 80, 120, **{"External id": 1}),  # half of it
        *kernel(GEMM, 130, 150, **{"External id": 2}),
        *kernel(REDUCE, 20, 50),
    ]
    found = analysed(*listed)
    (row,) = found.ops
    flops = 2 * 8 * 16 * 32
    assert (row["count"], row["ns"], row["flops"], row["flops_ns"]) == (2, 40_000, 1.5 * flops, 40_000)
    assert found.products == dict(flops=1.5 * flops, fp8_flops=0, known_ns=40_000, unknown_ns=0)
    assert not found.communication["collectives"]
    on_cpu = analysed(step(100, 200), *(event("aten::mm", "cpu_op", at, at + 10, **shapes) for at in (50, 150, 250)))
    assert on_cpu.products == dict(flops=flops, fp8_flops=0, known_ns=10_000, unknown_ns=0)


def test_a_kernel_in_two_precisions_has_two_rows():
    listed = [step(0, 100)]
    for i, dtype in enumerate(("c10::Float8_e4m3fn", "c10::BFloat16")):
        args = {"External id": i, "Input Dims": [[8, 16], [16, 32]], "Input type": [dtype, dtype]}
        listed += [
            event("aten::_scaled_mm", "cpu_op", i, i + 1, **args),
            *kernel(GEMM, 10 + 20 * i, 30 + 20 * i, **args),
        ]
    found = analysed(*listed)
    assert sorted((row["fp8"], row["count"], row["flops_ns"]) for row in found.ops) == [
        (False, 1, 20_000), (True, 1, 20_000),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name, dims, types, flops, fp8",
    [
        ("aten::addmm", [[32], [8, 16], [16, 32]], ["float"] * 3, 2 * 8 * 16 * 32, False),
        ("aten::bmm", [[4, 8, 16], [4, 16, 32]], ["float"] * 2, 4 * 2 * 8 * 16 * 32, False),
        ("aten::_scaled_mm", [[8, 16], [16, 32]], ["c10::Float8_e4m3fn"] * 2, 2 * 8 * 16 * 32, True),
        ("mkldnn::_linear_pointwise", [[2, 4, 16], [32, 16]], ["c10::BFloat16"] * 2, 2 * 8 * 16 * 32, False),
    ],
)
def test_flops_of_products(name, dims, types, flops, fp8):
    found = costs.product(name, {"Input Dims": dims, "Input type": types})
    assert found and (found[0], found[2]) == (flops, fp8)


def test_shapes_that_were_not_recorded_are_not_guessed():
    assert costs.product("aten::mm", {}) is None
    assert costs.product("aten::mm", {"Input Dims": [[8, 16], []], "Input type": ["float", ""]}) is None
    assert costs.product("aten::add", {"Input Dims": [[8, 16], [16, 8]]}) is None
    found = analysed(step(0, 100), kernel(GEMM, 10, 30))
    assert found.products == dict(flops=0, fp8_flops=0, known_ns=0, unknown_ns=20_000)


# Whatever a JSON file can hold, and what looks like shapes and types.
values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 40),
    st.just(10**400),
    st.floats(),
    st.sampled_from(["float", "c10::Half"]),
)
junk = st.recursive(values, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner))
shapes = st.lists(st.lists(st.integers(0, 40) | values, min_size=1, max_size=3) | junk, min_size=2, max_size=3) | junk
dtypes = st.lists(st.sampled_from(["float", "c10::BFloat16", "Float8_e4m3fn", "?"]) | junk, max_size=3) | junk
names = st.sampled_from([*costs._FACTORS, NORM])


@settings(max_examples=100, deadline=None)
@given(names, shapes, dtypes, junk, junk)
def test_shapes_that_cannot_be_are_not_known(name, dims, types, ranks, count):
    args = {"Input Dims": dims, "Input type": types, "External id": 3, "Group size": ranks, "dtype": "float",
            "Collective name": "allreduce", "In msg nelems": count, "Out msg nelems": 8}  # fmt: skip
    for found in (costs.product(name, args) or (), [costs.streamed(name, args), costs.bus_bytes(args)]):
        assert all(number is None or 0 <= number < 1e100 for number in found)
    op = event(name, "cpu_op", 1, 9, **args)
    for ran in ([], kernel(GEMM, 10, 30, **{"External id": 3}), kernel(REDUCE, 10, 30, **args)):
        found = analysed(step(0, 100), op, ran)
        assert Analysis.load(json.loads(json.dumps(found.json())), "here").ops


@pytest.mark.parametrize(
    "dims, types",
    [
        ([[8, 16], [16, "32"]], ["float"] * 2),
        ([[8, 16], [16, 32.0]], ["float"] * 2),
        ([[8, 16], [16, -32]], ["float"] * 2),
        ([[8, 16], [[16, 32]]], ["float"] * 2),
        ([[8, 16], [16, True]], ["float"] * 2),
        ([[8, 1 << 60], [1 << 60, 32]], ["float"] * 2),
        ([[8, 16], None], ["float"] * 2),
        ("8, 16", "float"),
    ],
)
def test_damaged_shapes_leave_the_cost_unknown(dims, types):
    args = {"Input Dims": dims, "Input type": types}
    assert costs.product("aten::mm", args) is None and costs.streamed(NORM, args) is None


@pytest.mark.parametrize("types", [None, "float", ["float"], [None, "float"], [["float"], 1], {}])
def test_damaged_types_leave_the_bytes_unknown(types):
    args = {"Input Dims": [[8, 16], [16, 32]], "Input type": types}
    assert costs.product("aten::mm", args)[:2] == (2 * 8 * 16 * 32, None) and costs.streamed(NORM, args) is None


@pytest.mark.parametrize(
    "collective, sizes, wire",
    [
        ("allreduce", (1000, 1000), 2 * 7 / 8 * 2000),
        ("_allgather_base", (1000, 8000), 7 / 8 * 16000),
        ("_reduce_scatter_base", (8000, 1000), 7 / 8 * 16000),
        ("broadcast", (1000, 1000), 2000),
    ],
)
def test_bus_bandwidth(collective, sizes, wire):
    about = {"Collective name": collective, "Group size": 8, "dtype": "BFloat16"}
    about.update(zip(("In msg nelems", "Out msg nelems"), sizes))
    (row,) = analysed(step(0, 100), kernel(REDUCE, 20, 40, **about)).communication["collectives"]
    assert row["bus_gb_per_s"] == pytest.approx(wire / 20e3)  # bytes in 20,000 ns
    (row,) = analysed(step(0, 100), kernel(REDUCE, 20, 40)).communication["collectives"]
    assert row["bus_gb_per_s"] is None


# ---- idle gaps


def test_each_gap_has_its_cause():
    found = analysed(
        step(0, 1000),
        mark("data", 0, 80),  # before the first kernel: 100 µs, 80 of them waiting for data
        kernel(GEMM, 100, 200),
        kernel(GEMM, 202, 300),  # 2 µs: no host could help it
        mark("garbage collection", 310, 390),
        kernel(GEMM, 400, 500),  # 100 µs
        event("cudaStreamSynchronize", "cuda_runtime", 450, 510),
        kernel(GEMM, 560, 600, launched=512),  # 60 µs: the queue ran dry while the host waited
        mark("data", 600, 615),
        kernel(GEMM, 640, 1000, launched=635),  # 40 µs, 15 of them for data: the host came late
    )
    assert found.gaps == {
        "waiting for data": dict(count=1, ns=100_000),
        "between kernels": dict(count=1, ns=2_000),
        "garbage collection": dict(count=1, ns=100_000),
        "synchronisation": dict(count=1, ns=60_000),
        "host": dict(count=1, ns=40_000),
    }
    assert sum(gap["ns"] for gap in found.gaps.values()) == found.idle_ns
    assert found.longest_gaps[2] == dict(start_ns=500_000, ns=60_000, cause="synchronisation")


# ---- always


kinds = st.sampled_from([GEMM, NORM, REDUCE, "flash_fwd", "_cross_entropy_kernel", "who_knows"])
random_kernels = st.lists(st.tuples(kinds, st.integers(0, 900), st.integers(0, 300), st.integers(0, 3)), min_size=1)


@settings(deadline=None)
@given(random_kernels, st.lists(st.integers(0, 1000), min_size=6, max_size=6))
def test_categories_and_idle_are_the_wall_time(drawn, edges):
    a, b, c, d, e, f = sorted(edges)
    found = analysed(
        step(a, max(f, a + 1)),
        mark("forward", a, b),
        mark("backward", b, c),
        mark("optimizer", d, e),
        *(kernel(name, at, at + took, stream) for name, at, took, stream in drawn),
    )
    assert sum(found.category_ns.values()) + found.idle_ns == found.wall_ns
    assert sum(sum(row.values()) for row in found.phase_ns.values()) + found.idle_ns == found.wall_ns
    assert sum(row["owned_ns"] for row in found.ops) + found.idle_ns == found.wall_ns
    assert sum(gap["ns"] for gap in found.gaps.values()) == found.idle_ns
    said = found.communication
    assert said["exposed_ns"] + said["overlapped_ns"] == said["total_ns"]
    assert said["exposed_ns"] == found.category_ns.get(costs.COMMUNICATION, 0)
    known = found.products["known_ns"] + found.products["unknown_ns"]
    assert known == found.category_ns.get(costs.PRODUCTS, 0)


# ---- memory


def test_peak_memory_by_the_phase_that_allocated_it():
    def call(at, count, total, address, device=1):
        args = {"Total Allocated": total, "Bytes": count, "Addr": address, "Device Type": device, "Device Id": 0}
        return dict(ph="i", cat="cpu_instant_event", name="[memory]", ts=at, pid=1, tid=1, args=args)

    found = analysed(
        step(0, 100), mark("forward", 0, 50), mark("backward", 50, 100), kernel(GEMM, 10, 20),
        call(10, 30, 130, 1), call(20, 20, 150, 2), call(60, -20, 130, 2), call(70, 40, 170, 3), call(80, -40, 130, 3),
        call(30, 5000, 5000, 4, device=0),  # the host's memory is not what is short
    )  # fmt: skip
    assert found.memory == dict(peak_bytes=170, by_phase={"forward": 30, "backward": 40, "before the recording": 100})


# ---- the CPU alone


def test_without_a_device_operators_are_counted_by_their_own_time():
    found = analysed(
        step(0, 100),
        mark("forward", 0, 60),
        mark("backward", 60, 100),
        event("aten::linear", "cpu_op", 10, 50),
        event("aten::t", "cpu_op", 12, 14),
        event("aten::addmm", "cpu_op", 20, 48),
        event("aten::mul", "cpu_op", 40, 70, tid=2),  # another thread: alone from 50 on, first at 48
    )
    assert not found.on_device and found.card is None
    assert found.category_ns == {costs.PRODUCTS: 36_000, costs.OTHER: 2_000, costs.STREAMING: 22_000}
    assert found.idle_ns == 40_000 and found.gaps == {"host": dict(count=2, ns=40_000)}


def test_a_real_trace_of_a_training_step(tmp_path):
    model = tiny.model()
    optimizer = model.setup_optimizer()
    x = torch.randint(300, (2, 64))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as recorded:
        with record_function("ProfilerStep#0"):
            with record_function("forward"):
                loss = model(x, x)
            with record_function("backward"):
                loss.backward()
            with record_function("optimizer"):
                optimizer.step()
    recorded.export_chrome_trace(str(tmp_path / "trace.json.gz"))
    found = analyse(read(tmp_path / "trace.json.gz"))
    assert not found.on_device and len(found.step_ns) == 1
    assert sum(found.category_ns.values()) + found.idle_ns == found.wall_ns
    assert {costs.PRODUCTS, costs.ATTENTION, costs.STREAMING, costs.OPTIMIZER} <= found.category_ns.keys()
    assert {"forward", "backward", "optimizer"} <= found.phase_ns.keys()
    # Each Linear multiplies three times: forward, and for its input and its weight (the head's all in forward; the
    # gates' inputs are parts of the stream, whose gradient is wanted too).
    linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert found.products["flops"] == pytest.approx(6 * 128 * linears, rel=0.05)
    assert found.memory and found.memory["peak_bytes"] > 0
    again = Analysis.load(json.loads(json.dumps(found.json())), "here")
    assert again == found


# ---- no traces


def changed(entry, about=None, **fields):
    return json.dumps(dict(traceEvents=[{**entry, **fields}], **(about or {}))).encode()


@pytest.mark.parametrize("name", [None, 7, ["NVIDIA H200"], {}])
def test_a_card_whose_name_is_no_text_is_unknown(name):
    assert analysed(step(0, 9), kernel(GEMM, 1, 5), deviceProperties=[dict(name=name)]).card is None


def test_a_trace_in_which_nothing_took_time_is_refused():
    with pytest.raises(UserError, match="nothing in the trace took any time"):
        analysed(kernel(GEMM, 5, 5))


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "cannot be read"),
        (b"", "is cut off or no JSON"),
        (b"[" * 100_000, "is cut off or no JSON \\(it is nested too deep"),
        (b'{"traceEvents": ' + b"9" * 5000 + b"}", "is cut off or no JSON \\(a number has more digits than"),
        (b'{"traceEvents": [{"ph": "X", "na', "is cut off or no JSON"),
        (gzip.compress(b'{"traceEvents": []}' * 99, mtime=0)[:-20], "is cut off or no JSON"),
        (b"\xff\xfe\x00", "is cut off or no JSON"),
        (b'{"rows": []}', "is no trace: it has no list of traceEvents"),
        (b'"text"', "is no trace: it has no list of traceEvents"),
        (b'{"traceEvents": []}', "holds no kernel and no operator"),
        (b'{"traceEvents": [{"ph": "X", "name": "a", "cat": "kernel", "dur": 1}]}', "event 0 is damaged"),
        (b'{"traceEvents": [{"ph": "X", "name": "a", "cat": "kernel", "ts": "?", "dur": 1}]}', "event 0 is damaged"),
        (b'{"traceEvents": [7]}', "event 0 is damaged"),
        (changed(kernel(GEMM, 1, 2)[1], args=[1]), "event 0 is damaged"),
        (changed(kernel(GEMM, 1, 2)[1], args={"External id": [1]}), "event 0 is damaged"),
        (changed(kernel(GEMM, 1, 2)[1], tid=[1]), "event 0 is damaged"),
        (changed(kernel(GEMM, 1, 2)[1], about=dict(deviceProperties={"name": "x"})), "deviceProperties is no list"),
        (changed(kernel(GEMM, 1, 2)[1], about=dict(nanochat={"x": 1})), "is damaged: nanochat.stage: field required"),
        (changed(kernel(GEMM, 1, 2)[1], about=dict(nanochat=[1])), "is damaged: nanochat"),
        (json.dumps(dict(traceEvents=[step(0, 10)])).encode(), "holds no kernel and no operator"),
    ],
)
def test_what_is_no_trace_is_one_sentence(tmp_path, content, words):
    path = tmp_path / "trace.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        read(path)


def test_results_of_another_version_are_refused():
    made = analysed(step(0, 100), kernel(GEMM, 10, 20)).json()
    with pytest.raises(UserError, match=f"here is of version 99, and this code reads version {VERSION}"):
        Analysis.load(dict(made, version=99), "here")
    with pytest.raises(UserError, match="here is no profile.json"):
        Analysis.load([1], "here")
    damaged = [{"version": VERSION, "category_ns": {}, "ops": []}, dict(made, wall_ns="x"), dict(made, ops=[{}])]
    damaged += [dict(made, category_ns={"a": "b"}), dict(made, step_ns=None)]
    for content in damaged:
        with pytest.raises(UserError, match="here is damaged: .* make it again"):
            Analysis.load(content, "here")


# ---- clocks and names of other programs


def written(tmp_path, text, packed=False):
    path = tmp_path / "trace.json"
    path.write_bytes(gzip.compress(text) if packed else text)
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_microseconds_since_1970_keep_their_nanoseconds(tmp_path, packed):
    """As exporters write them that subtract no base: 1.7e15 µs, where a float has a resolution of a quarter of one."""
    start, count = 1_732_608_000_123_456_789, 1000
    times = [start + 1_037 * i for i in range(count + 1)]  # ns; kernels without any gap
    text = ", ".join(
        f'{{"ph": "X", "cat": "kernel", "name": "{NORM}", "pid": 0, "tid": 7, "args": {{"stream": 7}}, '
        f'"ts": {a // 1000}.{a % 1000:03}, "dur": {(b - a) // 1000}.{(b - a) % 1000:03}}}'
        for a, b in zip(times, times[1:])
    )
    found = read(written(tmp_path, f'{{"traceEvents": [{text}]}}'.encode(), packed))
    assert [event.start for event in found.events] == times[:-1]
    analysis = analyse(found)
    assert (analysis.wall_ns, analysis.idle_ns) == (1_037 * count, 0)


@pytest.mark.parametrize("time", ["1e999", "-1e30", "1e400000000", '"soon"', "null", "[0, [1], 2]", "NaN", "true"])
def test_times_that_cannot_be(tmp_path, time):
    text = f'{{"traceEvents": [{{"ph": "X", "cat": "cpu_op", "name": "x", "ts": {time}, "dur": 1}}]}}'
    with pytest.raises(UserError, match="event 0 is damaged"):
        read(written(tmp_path, text.encode()))


def test_a_kernel_whose_name_is_not_text(tmp_path):
    from profiling.recorded import step_page

    names = [b"void gemm_\xff\xfe", b"half \\ud83d", b"\xed\xa0\xbd pair", "grün".encode("latin-1")]
    listed = [
        b'{"ph": "X", "cat": "kernel", "name": "%s", "pid": 0, "tid": 7, "ts": %d, "dur": 5, "args": {}}'
        % (name, 9 * i)
        for i, name in enumerate(names)
    ]
    path = written(tmp_path, b'{"traceEvents": [' + b",".join(listed) + b"]}")
    found = read(path).events
    assert [event.name[:5] for event in found] == ["void ", "half ", "\ufffd\ufffd\ufffd p", "gr\ufffdn"]
    page, _ = step_page.write(path, tmp_path)
    assert "void gemm_" in page.read_text("utf-8")


def test_a_page_about_a_file_whose_name_is_no_text(tmp_path):
    from profiling.recorded import step_page

    path = tmp_path / "tr\udce9ce.json"
    path.write_text(json.dumps(dict(traceEvents=[step(0, 100), *kernel(NORM, 10, 50)])))
    page, _ = step_page.write(path, tmp_path)
    assert r"tr\udce9ce.json" in page.read_text("utf-8")


@pytest.mark.parametrize(
    "value", [{"a": 1}, [["deep"]], json.loads("[" * 500 + "]" * 500)], ids=["object", "list", "deep"]
)
def test_a_sensors_row_of_anything_else_is_damage(tmp_path, value):
    about = dict(stage="base", first_step=0, tokens_per_step=1, world=1, device="x", dtype="x", fp8=None, compiled=True,
                 torch="x", flops_per_token={})  # fmt: skip

    def reading(nvml):
        content = dict(traceEvents=[step(0, 100), *kernel(NORM, 10, 50)], nanochat=dict(about, nvml=nvml))
        return read(written(tmp_path, json.dumps(content).encode()))

    sound = [dict(t=0.0, throttle=["power"])]
    assert reading(sound).meta["nvml"] == sound
    with pytest.raises(UserError, match="a list of lists or an object"):
        reading([dict(t=0.0, power_w=value)])


def test_a_trace_is_never_written_over(tmp_path, capsys):
    from profiling.recorded import step_page

    text = json.dumps(dict(traceEvents=[step(0, 100), *kernel(NORM, 10, 50)]))
    for name in ("profile.json", "other.json"):
        (tmp_path / name).write_text(text)
        assert tiny.call_module("profiling.__main__", "trace", str(tmp_path / name)) == 0
        assert (tmp_path / name).read_text() == text
    made = {f"{name}.profile.{ending}" for name in ("profile", "other") for ending in ("json", "html")}
    assert {path.name for path in tmp_path.iterdir()} == made | {"profile.json", "other.json"}
    pair = [str(tmp_path / f"{name}.profile.json") for name in ("profile", "other")]
    assert tiny.call_module("profiling.__main__", "diff", *pair) == 0
    with pytest.raises(UserError, match="profile.json is the trace itself"):
        step_page.write(tmp_path / "profile.json", tmp_path)


def test_the_page_of_a_pipe_comes_where_the_user_stands(tmp_path, monkeypatch):
    from profiling.recorded import step_page

    (tmp_path / "t.json").touch()
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/stdin", "/dev/fd/63", "/proc/self/fd/0", tmp_path / "pipe"):
        assert step_page.home_of(Path(path)) == Path()
    monkeypatch.chdir("/dev")
    assert step_page.home_of(Path("stdin")) == Path()
    for path in (tmp_path / "t.json", tmp_path / "missing.json"):
        assert step_page.home_of(path) == tmp_path


def test_a_template_of_inductors_multiplies():
    name, shapes = "triton_tem_fused_mm_relu_square_0", {"Input Dims": [[64, 32]] * 2, "Input type": ["float"] * 2}
    assert costs.category(name) == costs.PRODUCTS and costs.streamed(name, shapes) is None
    assert costs.category("triton_poi_fused_mm_0") == costs.STREAMING and costs.streamed(NORM, shapes)
    assert costs.category("triton_tem_fused_flex_attention_0") == costs.ATTENTION
