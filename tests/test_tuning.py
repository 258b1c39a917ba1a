"""The tuner with stand-ins for the card: candidates, what it writes, that nothing of a trial stays behind."""

import itertools
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import standins
import torch

from kernels import OPS, child_compile, dispatch, measured, registry, triton_utils, tuned, tuning
from kernels.__main__ import main

pytestmark = pytest.mark.skipif(not triton_utils.INSTALLED, reason="Triton is not installed, so nothing can be tuned")


@pytest.fixture
def card(tmp_path, monkeypatch):
    """A card named sm_99 on which the time of a kernel is the number of elements that its config names."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    (folder / "default.json").write_text((tuned.FOLDER / "default.json").read_text())
    monkeypatch.setattr(tuned, "FOLDER", folder)
    monkeypatch.setattr(tuned, "architecture", lambda index: "sm_99")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "home"))
    monkeypatch.setattr(measured, "identity", lambda index: dict(card="Card 99", torch="2"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 9))
    op = OPS["rms_norm"]
    inputs = lambda case, dtype, device: op.inputs(case, torch.float32, "cpu")
    monkeypatch.setitem(OPS, "rms_norm", replace(op, cases=dict(d0=dict(N=4, C=32), d1=dict(N=4, C=64)), inputs=inputs))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(measured, "_kept", {})
    tuned.table.cache_clear()
    yield folder / "sm_99.json"
    measured.adopt(None)
    tuned.table.cache_clear()


GPU = torch.device("cuda", 0)


@pytest.fixture
def timed(monkeypatch):
    """Milliseconds: a thousandth of the elements in force, or 3 for what runs no kernel; 8 warps do not run."""

    def times(calls):
        found = []
        for call in calls:
            seen = []
            with monkeypatch.context() as patch:
                patch.setattr(tuning, "use", lambda _, seen=seen: seen.append(tuned.config(*WIDE)) or nullcontext())
                call()
            if seen[0]["num_warps"] == 8:
                raise RuntimeError("out of resource: registers")
            found.append(seen[0]["elements"] / 1000)
        return found

    monkeypatch.setattr(tuning, "timed", times)


WIDE = ("rms_norm", torch.bfloat16, 64, GPU)


def test_it_climbs_to_the_fastest_and_uses_and_keeps_it(card, timed, capsys):
    rows = tuning.tune(tuning.registered_cases(["rms_norm"]), reference=False)
    assert [row["up_to"] for row in rows["rms_norm"]] == [32, 64]
    for row in rows["rms_norm"]:
        assert row["config"]["elements"] == 1 and row["ms"] == 0.001 and row["dtype"] == "bfloat16"
        assert "reference_ms" not in row
    assert "does not run" in capsys.readouterr().out
    assert tuned.config(*WIDE)["elements"] == 1  # in force from now on
    measured.store(0, blocks=rows)
    measured.adopt(None)
    measured.forget()
    assert tuned.config(*WIDE)["elements"] == 1  # another process finds it
    assert not card.exists()


def test_it_stops_when_the_time_is_over(card, timed, capsys):
    rows = tuning.tune(tuning.registered_cases(["rms_norm"]), seconds=-1.0, reference=False)
    assert rows == {} and capsys.readouterr().out.count("no time was left") == 2


def test_the_reference_decides_only_where_it_was_measured_beside(card, monkeypatch):
    monkeypatch.setattr(tuning, "timed", lambda calls: [2.0, 1.0][: len(calls)])
    rows = tuning.tune(tuning.registered_cases(["rms_norm"]))
    assert [row.get("reference_ms") for row in rows["rms_norm"]] == [None, 1.0]  # compiled once, for the largest
    for size in (32, 64):
        assert tuned.verdict("rms_norm", torch.bfloat16, size, GPU, True) == (
            False, "measured on this kind of card: 2 ms, 1 by torch.compile"
        )  # fmt: skip
    measured.adopt({"rms_norm": [{k: v for k, v in row.items() if k != "reference_ms"} for row in rows["rms_norm"]]})
    assert tuned.verdict("rms_norm", torch.bfloat16, 64, GPU, False)[0]


def test_what_was_measured_beside_the_reference_is_again(card, monkeypatch):
    """Else the largest size's times would decide for one in which our kernels were faster."""
    row = dict(dtype="bfloat16", up_to=32, config=dict(elements=1, backward_elements=1, num_warps=1), ms=1.0)
    card.write_text(json.dumps(dict(rms_norm=[dict(row, reference_ms=2.0)])))
    tuned.table.cache_clear()
    monkeypatch.setattr(tuning, "timed", lambda calls: [2.0, 1.0][: len(calls)])
    tuning.into_repository(tuning.tune(tuning.registered_cases(["rms_norm"])))
    found = json.loads(card.read_text())["rms_norm"]
    assert [(row["up_to"], row.get("reference_ms")) for row in found] == [(32, 1.0), (64, 1.0)]


def test_a_trainings_own_tuning_leaves_what_was_measured_beside_the_reference(card, monkeypatch, capsys):
    """Else `auto` would take again what was found to be slower."""
    monkeypatch.setattr(tuning, "timed", lambda calls: [2.0, 1.0][: len(calls)])
    before = tuning.tune(dict(rms_norm=[dict(N=4, C=64)]))
    assert "reference_ms" in before["rms_norm"][0]
    after = tuning.tune(tuning.registered_cases(["rms_norm"]), reference=False)
    assert after["rms_norm"][-1] == before["rms_norm"][0] and len(after["rms_norm"]) == 2
    assert not tuned.verdict("rms_norm", torch.bfloat16, 64, GPU, True)[0]


def test_rows_for_the_repository_stand_before_those_that_are_there(card, timed):
    static = dict(
        rms_norm=[dict(dtype="*", config=dict(elements=512, backward_elements=64, num_warps=1))],
        add_rms_norm="rms_norm",
    )
    card.write_text(json.dumps(static))
    tuned.table.cache_clear()
    tuning.into_repository(tuning.tune(tuning.registered_cases(["rms_norm"]), reference=False))
    measured.adopt({})
    found = json.loads(card.read_text())
    assert [row.get("up_to") for row in found["rms_norm"]] == [32, 64, None] and found["add_rms_norm"] == "rms_norm"
    assert tuned.config(*WIDE)["elements"] == 1
    assert tuned.config("rms_norm", torch.bfloat16, 128, GPU)["elements"] == 512


def test_a_wrong_answer_is_no_candidate(card, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "timed", lambda calls: [1.0] * len(calls))
    monkeypatch.setattr(tuning, "right", lambda op, case, dtype: False)
    assert tuning.tune(tuning.registered_cases(["rms_norm"])) == {}
    assert "not tuned: RuntimeError: its answer is wrong" in capsys.readouterr().out


def test_a_candidate_that_breaks_the_gpu_ends_the_tuning(card, timed, monkeypatch, capsys):
    """Whatever came next would fail as it did, and be said to be its own fault."""
    tried = []

    def right(op, case, dtype):
        tried.append(tuned.config(*WIDE))
        if len(tried) > 1:
            standins.lost(monkeypatch)
            torch.cuda.synchronize()
        return True

    monkeypatch.setattr(tuning, "right", right)
    monkeypatch.setattr(sys, "argv", ["kernels", "tune", "--op=rms_norm"])
    with pytest.raises(SystemExit):
        main()
    error = capsys.readouterr().err
    assert len(tried) == 2 and error.count("\n") == 1
    assert error.startswith(f"error: rms_norm, {tried[1]}: CUDA error: an illegal memory access was encountered; ")
    assert error.endswith("NANOCHAT_KERNELS=auto,rms_norm=torch, or tune the others (--op): what was found is kept\n")


def test_a_first_configuration_that_breaks_the_gpu_ends_the_tuning(card, monkeypatch):
    standins.lost(monkeypatch)
    monkeypatch.setattr(tuning, "measure", lambda *_: torch.cuda.synchronize())
    with pytest.raises(dispatch.Lost, match="rms_norm, size 64: CUDA error: an illegal memory access"):
        tuning.tune(tuning.registered_cases(["rms_norm"]))


def test_a_user_without_a_home_has_nothing_measured(card, monkeypatch):
    monkeypatch.delenv("NANOCHAT_BASE_DIR")

    def nowhere(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nowhere)
    monkeypatch.setattr(Path, "home", nowhere)
    assert measured.load(0) == {}
    with pytest.raises(FileNotFoundError, match="no such home directory; set NANOCHAT_BASE_DIR"):
        measured.store(0, steps={})


def test_a_damaged_file_of_measurements_is_said_and_measured_again(card):
    measured.store(0, blocks={"rms_norm": []})
    measured.path(0).write_text("{")
    with pytest.warns(UserWarning, match="is not used"):
        assert measured.blocks(0) == {}
    with pytest.warns(UserWarning, match="is not used"):
        measured.store(0, steps={"a": 1})
    assert measured.load(0)["steps"] == {"a": 1}


def test_neighbours_change_one_size_by_a_step():
    found = tuning.neighbours(dict(elements=4096, num_warps=1, num_stages=2, GROUP_M=8))
    assert dict(elements=2048, num_warps=1, num_stages=2, GROUP_M=8) in found
    assert dict(elements=4096, num_warps=1, num_stages=3, GROUP_M=8) in found
    assert len(found) == 5 and all(value >= 1 for config in found for value in config.values())


def test_every_op_has_a_size():
    for name in tuned.ops():
        for case in OPS[name].cases.values():
            assert OPS[name].size(case) >= 1


def test_a_wrong_gradient_is_a_wrong_answer(monkeypatch):
    op = OPS["embedding"]
    assert tuning.right(op, op.cases["odd"], torch.bfloat16, "cpu")
    monkeypatch.setitem(op.fn.__globals__, "_embedding_backward", lambda *rest: None)
    assert not tuning.right(op, op.cases["odd"], torch.bfloat16, "cpu")


# ---- what is searched, and how long


def test_rows_that_are_shared_are_searched_with_the_op_that_comes_first(card, timed, monkeypatch):
    """A training runs mix_rms_norm; its rows are rms_norm's, which it may never run."""
    monkeypatch.setattr(tuning, "right", lambda *_: True)
    for name in ("mix_rms_norm", "add_rms_norm"):
        op = OPS[name]
        inputs = lambda case, dtype, device, op=op: op.inputs(case, torch.float32, "cpu")
        monkeypatch.setitem(OPS, name, replace(op, inputs=inputs))
    searched, climb = [], tuning.climb
    monkeypatch.setattr(tuning, "climb", lambda *args: searched.append((args[0].name, args[5] > 0)) or climb(*args))
    case = dict(N=4, C=64)
    tuning.tune({name: [case] for name in ("mix_rms_norm", "rms_norm", "add_rms_norm")}, reference=False)
    assert searched == [("mix_rms_norm", True), ("rms_norm", False), ("add_rms_norm", False)]
    measured.adopt({})
    rows = tuning.tune({"mix_rms_norm": [case]}, reference=False)
    assert rows["rms_norm"][0]["measured_with"] == "mix_rms_norm"
    for name in ("mix_rms_norm", "rms_norm", "add_rms_norm"):
        assert tuned.config(name, torch.bfloat16, 64, GPU)["elements"] == 1


def test_every_kernel_of_attention_with_rows_of_its_own_is_searched(card, timed, monkeypatch):
    searched = []
    found = lambda op, case, dtype, part, start, *rest: searched.append(part) or (dict(start, num_stages=9), 1.0)
    monkeypatch.setattr(tuning, "climb", found)
    tuning.tune({"flash_attention": [dict(B=1, T=4, H=1, K=1, D=16, W=-1)]}, reference=False)
    assert searched == ["flash_attention", "flash_attention_backward", "flash_attention_dq_backward"]
    assert all(tuned.config(part, torch.bfloat16, 16, GPU)["num_stages"] == 9 for part in searched)
    alone = {name for name in tuned.table("default") if name.endswith("_backward")}
    assert alone == {"fp8_amax_backward", *(part for parts in tuning.BACKWARD.values() for part in parts)}


def test_those_with_most_to_gain_come_first_and_no_case_is_too_large():
    found = tuning.registered_cases(tuned.ops())
    assert sorted(found) == sorted(tuned.ops()) and set(tuning.FIRST) <= set(found)
    order = list(found)
    assert order[:3] == ["flash_attention", "polar_express", "embedding"]
    for op in found:
        sharing = [name for name in order if tuned.owner(name) == tuned.owner(op)]
        assert sharing[0] in {"mix_rms_norm", "qk_norm_rotary", "mlp_relu2", "fp8_mlp_relu2", "polar_express",
                              "fp8_mix_rms_norm"} or sharing == [op]  # fmt: skip
        assert found[op] and all(OPS[op].bytes(case, torch.bfloat16) <= tuning.MOST_BYTES for case in found[op])


class Time:
    """A clock that goes on when told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(tuning.time, "monotonic", lambda: self.now)


def test_ops_share_the_time_and_what_one_leaves_others_have(card, monkeypatch, capsys):
    time, taken = Time(monkeypatch), {}

    def measure(op, case, dtype, searched, ends, reference, say):
        taken.setdefault(op.name, []).append(ends - time.now)
        time.now = ends if op.name != "add_rms_norm" else time.now + 30  # one needs less than it may have
        return {op.name: [dict(dtype="bfloat16", up_to=op.size(case), config={}, ms=1.0)]}

    monkeypatch.setattr(tuning, "measure", measure)
    one, two = [dict(N=4, C=64)], [dict(N=4, C=64), dict(N=8, C=64), dict(N=4, C=32)]
    tuning.tune(dict(rms_norm=two, add_rms_norm=one, mix_rms_norm=one), seconds=300.0)
    assert taken == dict(rms_norm=[50, 50], add_rms_norm=[100], mix_rms_norm=[170])  # the two of one size are one
    assert "no time" not in capsys.readouterr().out


def test_nothing_is_tried_that_would_end_too_late(card, monkeypatch):
    time, checked = Time(monkeypatch), []

    def right(*_):
        checked.append(time.now)
        time.now += 4.0  # it compiles
        return True

    monkeypatch.setattr(tuning, "right", right)
    monkeypatch.setattr(tuning, "timed", lambda calls: [1.0] * len(calls))
    tuning.tune({"rms_norm": [dict(N=4, C=64)]}, seconds=11.0, reference=False)
    assert checked == [0.0, 4.0] and time.now <= 11.0


def fails_at(monkeypatch, name, problem):
    def measure(op, case, *rest):
        if op.name == name:
            raise problem
        return {op.name: [dict(dtype="bfloat16", up_to=op.size(case), config=dict(elements=7, num_warps=1), ms=1.0)]}

    monkeypatch.setattr(tuning, "measure", measure)


@pytest.mark.parametrize("flags", [[], ["--into-repo"]])
def test_what_was_found_before_it_was_stopped_is_kept(card, monkeypatch, capsys, flags):
    fails_at(monkeypatch, "rms_norm", KeyboardInterrupt())
    monkeypatch.setattr(sys, "argv", ["kernels", "tune", "--op=mix_rms_norm,rms_norm", *flags])
    with pytest.raises(SystemExit) as ended:
        main()
    path = card if flags else measured.path(0)
    assert ended.value.code == 130 and f"stopped; written: {path}" in capsys.readouterr().out
    rows = json.loads(path.read_text())
    assert (rows if flags else rows["blocks"])["mix_rms_norm"][0]["config"]["elements"] == 7


def test_what_does_not_fit_is_said_and_its_memory_given_back(card, monkeypatch, capsys):
    freed = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
    fails_at(monkeypatch, "rms_norm", torch.OutOfMemoryError("CUDA out of memory"))
    case = dict(N=4, C=64)
    rows = tuning.tune(dict(rms_norm=[case], mix_rms_norm=[case]))
    assert "rms_norm, size 64: not tuned: it does not fit in the memory of this card" in capsys.readouterr().out
    assert freed == [True] and list(rows) == ["mix_rms_norm"]


def test_an_op_that_is_promised_in_no_dtype_of_the_card_is_not_searched(card, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (7, 5))
    monkeypatch.setattr(tuning, "measure", None)
    assert tuning.tune(dict(fp8_linear=[dict(OPS["fp8_linear"].cases["d12"])])) == {}
    assert ": not tuned: fp8_linear makes no promise for float16" in capsys.readouterr().out


def test_an_op_that_the_card_has_no_instructions_for_is_not_searched(card, monkeypatch, capsys):
    monkeypatch.setattr(tuned, "architecture", lambda index=0: "sm_80")
    monkeypatch.setattr(tuning, "measure", None)
    assert tuning.tune(dict(fp8_linear=[dict(OPS["fp8_linear"].cases["d12"])])) == {}
    assert ": not tuned: sm_80 has no fp8" in capsys.readouterr().out


def test_on_amds_cards_sizes_that_end_their_compiler_are_not_searched(card, monkeypatch, capsys):
    """Each size has kernels of its own; the first that runs is timed beside the reference."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    crashes = lambda op, size, dtype, arch: "the compiler crashed (signal 11)" if size in (512, 128) else ""
    monkeypatch.setattr(child_compile, "compiles_in_child", crashes)
    searched = []

    def measure(op, case, dtype, done, ends, reference, say):
        searched.append((case["C"], reference))
        return {}

    monkeypatch.setattr(tuning, "measure", measure)
    tuning.tune(dict(mix_rms_norm=[dict(N=8, C=size) for size in (512, 256, 128, 64)]))
    assert searched == [(256, True), (64, False)]
    assert "mix_rms_norm, size 512: not tuned: the compiler crashed" in capsys.readouterr().out


@pytest.mark.parametrize("capability, narrow", [((9, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_muons_kernels_are_tuned_as_a_training_calls_them(card, monkeypatch, capability, narrow):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
    seen = []

    def measure(op, case, dtype, *more):
        seen.append((op.name, case.get("mixed"), dtype))
        return {}

    monkeypatch.setattr(tuning, "measure", measure)
    tuning.tune({name: [dict(K=1, m=8, n=16)] for name in tuning.MASTERS} | dict(adamw_=[dict(N=64)]))
    wide = [(name, int(capability == (9, 0)), torch.float32) for name in tuning.MASTERS]
    assert seen == [*wide, ("adamw_", None, narrow)]


@pytest.mark.parametrize(
    "problem, said",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "does not fit in the memory of this card: not timed"),
        (RuntimeError("no graph"), "was not timed: RuntimeError: no graph"),
    ],
)
def test_a_reference_that_does_not_run_loses_nothing(card, timed, monkeypatch, capsys, problem, said):
    freed = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
    step = tuning.step

    def steps(op, case, dtype, setting, compiled):
        if compiled:
            raise problem
        return step(op, case, dtype, setting, compiled)

    monkeypatch.setattr(tuning, "step", steps)
    rows = tuning.tune(dict(rms_norm=[dict(N=4, C=64)]))
    assert rows["rms_norm"][0]["config"] and "reference_ms" not in rows["rms_norm"][0]
    assert f"rms_norm: its compiled reference {said}" in capsys.readouterr().out
    assert bool(freed) == isinstance(problem, torch.OutOfMemoryError)


def test_of_a_compilers_error_the_last_line_is_said():
    assert tuning.one_line(type("CompilationError", (Exception,), {})("at 1:0:\ndef k():\n^\nno fp8\n")) == (
        "CompilationError: no fp8"
    )
    assert tuning.one_line(RuntimeError("CUDA error: x\nCompile with …")) == "RuntimeError: CUDA error: x"


def test_large_inputs_are_drawn_on_the_card_in_their_dtype(monkeypatch):
    drawn = []
    monkeypatch.setattr(registry, "LARGE", 100)
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": type("", (), dict(manual_seed=lambda self, n: None))())
    empty = torch.empty
    made = lambda shape, generator, device, dtype=torch.float32: (
        drawn.append((device, dtype)) or empty(shape, dtype=dtype)
    )
    monkeypatch.setattr(torch, "randn", made)
    registry.randn((10, 10), torch.bfloat16, "cuda", 1, 4.0)
    registry.randn((10, 10), torch.bfloat16, "cpu")
    assert drawn == [("cuda", torch.bfloat16), ("cpu", torch.float32)]


# ---- the clock


class Device:
    """Stand-in of a card: sweeps of 0.1 ms, a call of 0.05, for which the host needs `host` ms."""

    def __init__(self, monkeypatch, host):
        self.host, self.now, self.free, self.waits, self.sweeps = host, 0.0, 0.0, False, 0
        device = self

        class Event:
            def __init__(self, enable_timing):
                pass

            def record(self):
                self.time = max(device.now, device.free)

            def query(self):
                return self.time <= device.now

            def elapsed_time(self, end):
                return end.time - self.time

        class Sweep:
            def zero_(self):
                device.sweeps += 1
                device.work(0.1)

        monkeypatch.setattr(torch, "empty", lambda *_, **__: Sweep())
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)

    def work(self, ms):
        self.free = max(self.now, self.free) + ms

    def synchronize(self):
        self.now = max(self.now, self.free)

    def call(self):
        self.now += self.host
        self.work(0.05)
        if self.waits:
            self.synchronize()


@pytest.mark.parametrize("host", [0.01, 1.0, 10.0])
def test_the_clock_has_the_cards_time_not_the_hosts(monkeypatch, host):
    device = Device(monkeypatch, host)
    rounds = tuning.turns([lambda: device.call, lambda: lambda: device.work(0.2)], tuning.clock())
    for first, second in itertools.islice(rounds, 4):
        assert first == pytest.approx(0.05) and second == pytest.approx(0.2)


def test_what_one_slow_call_needs_the_others_do_not_wait_for_for_ever(monkeypatch):
    device = Device(monkeypatch, 1.0)
    clock = tuning.clock()
    next(tuning.turns([lambda: device.call], clock))
    for _ in range(4 * tuning.EASED):
        clock(lambda: device.work(0.2))
    device.sweeps = 0
    clock(lambda: device.work(0.2))
    assert device.sweeps == tuning.SWEEPS


def test_a_call_that_waits_for_the_card_is_timed_too(monkeypatch):
    device = Device(monkeypatch, 1.0)
    device.waits = True
    found = list(itertools.islice(tuning.turns([lambda: device.call], tuning.clock()), 3))
    assert all(ms > 0.0499 for (ms,) in found)


@pytest.mark.parametrize("ms, reference, slower", [(1.0, 0.97, False), (1.0, 0.9, True), (0.01, 0.009, False)])
def test_a_little_faster_is_noise(card, ms, reference, slower):
    row = dict(dtype="*", config=dict(elements=1, num_warps=1), ms=ms, reference_ms=reference)
    measured.adopt({"rms_norm": [row]})
    assert tuned.verdict("rms_norm", torch.bfloat16, 64, GPU, True)[0] != slower
