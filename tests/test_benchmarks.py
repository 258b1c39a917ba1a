"""The suite in its smoke mode, as a command; the gate; the timer with a clock that is no clock; the training step."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import standins
import tiny
import torch

from benchmarks import __main__ as command
from benchmarks import ops, our_step, pages, profiles, timer, training_step
from benchmarks.contenders import CONTENDERS, PEERS, Contender, obstacle
from benchmarks.gate import Gate, agreement, answers, narrow
from kernels import OPS, child_compile, dispatch, tuned, tuning
from nanochat.gpt import GPTConfig
from nanochat.hardware import setup
from nanochat.render import markdown

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
MACHINE = ops.Machine(CPU, torch.float32, 1e11, 1e11, 1e10, lambda call: (call(), 2.0)[1])


def no_compiler(op="rms_norm", case="odd"):
    return ops.Bench(OPS[op], case, "", dict(compiled="not in this test"))


# ---- the command


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A result of `python -m benchmarks run` for two cheap ops, one of them with a peer."""
    out = tmp_path_factory.mktemp("benchmarks") / "result.json"
    words = [sys.executable, "-m", "benchmarks", "run", "--profile=smoke", "--op=rotary,adamw_", f"--out={out}"]
    made = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert made.returncode == 0, made.stderr[-2000:]
    said = json.loads(made.stdout.strip().split("\n")[-1])
    return out, said


def test_smoke_measures_everything_it_names(smoke):
    out, said = smoke
    result = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in the file"))
    assert result["format"] == 1 and result["profile"] == "smoke" and result["training"] is None
    assert result["environment"]["machine"] and result["environment"]["torch"] == torch.__version__
    rows = result["rows"]
    keys = {(row["op"], row["case"], row["way"], row["contender"]) for row in rows}
    assert len(keys) == len(rows)
    for case in ("odd", "d4"):
        assert {way for op, at, way, who in keys if (op, at, who) == ("rotary", case, "eager")} == set(ops.WAYS)
        assert ("adamw_", case, "forward", "torch") in keys
    timed = [row for row in rows if row["status"] == "timed"]
    assert len(timed) == said["timed"] == 2 * (3 + 2)
    for row in timed:
        assert row["gate"]["error"] <= row["gate"]["allowed"]
        assert 0 < row["q1_ms"] <= row["median_ms"] <= row["q3_ms"] and len(row["samples_ms"]) >= timer.LEAST
        assert math.isfinite(row["times_eager"]) and row["gb_per_s"] > 0 and row["roofline"] > 0
        assert "peak_mb" not in row  # of a GPU only
    assert all(row["why"] for row in rows if row["status"] == "skipped")


@pytest.mark.parametrize("end", [KeyboardInterrupt, dispatch.Lost])
def test_what_was_measured_before_an_end_is_kept(end, tmp_path, monkeypatch):
    measured, usual, out = [], ops.measure, tmp_path / "kept.json"

    def measure(bench, *rest):
        if measured:
            raise end("an illegal memory access")
        measured.append(bench)
        return usual(bench, *rest)

    monkeypatch.setattr(ops, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "run", "--op=rotary", "--minutes=0.01", f"--out={out}"])
    with pytest.raises(SystemExit) as ended:
        command.run()
    result = json.loads(out.read_text())
    assert ended.value.code == 130 and result["stopped"] and result["minutes"] == 0.01
    timed = [row for row in result["rows"] if row["status"] != "failed"]
    assert {row["case"] for row in timed} == {measured[0].case}
    assert any(row["status"] == "failed" for row in result["rows"]) == (end is dispatch.Lost)
    assert ", stopped before its end." in out.with_suffix(".md").read_text()


def test_smoke_writes_tables_and_a_page(smoke):
    out, _ = smoke
    text, page = out.with_suffix(".md").read_text(), out.with_suffix(".html").read_text()
    for row in json.loads(out.read_text())["rows"]:
        if row["status"] == "timed":
            assert re.search(rf"\| {row['case']} \| {row['way']} \| {row['contender']} \| [\d,.]+\s\(", text)
    assert "our kernels need a CUDA device" in text and "Roofline" in text
    assert page.count("<svg") == 1 and "<script" not in page and "nan" not in text.lower().replace("nanochat", "")


def test_a_page_of_another_is_not_written_over(tmp_path, capsys, monkeypatch):
    from benchmarks import __main__ as command

    monkeypatch.setattr(command, "measured", lambda *_: pytest.fail("measured"))
    for ending in ("md", "html"):
        (other := tmp_path / f"README.{ending}").write_text("mine")
        flags = ("--profile=smoke", f"--out={tmp_path / 'README.json'}")
        assert tiny.call_module("benchmarks.__main__", "run", *flags) == 2
        assert f"README.{ending} would be written over" in capsys.readouterr().err and other.read_text() == "mine"
        other.unlink()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["run", "--op=softmax"], "no op is called softmax; there are"),
        (["run", "--profile=huge"], "wanted one of smoke, quick, full"),
        (["run", "--profile=quick"], "torch sees none here"),
        (["run", "--out=result.txt"], "a name ending in .json"),
        (["compare", "one.json"], "wanted: python -m benchmarks run"),
    ],
)
def test_wrong_use_is_one_sentence(capsys, monkeypatch, flags, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tiny.call_module("benchmarks.__main__", *flags) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_what_breaks_costs_its_own_rows_alone(monkeypatch):
    real = ops.measure

    def measure(bench, *more):
        if bench.op.name == "rotary":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(bench, *more)

    def no_training(*_):
        raise AssertionError("no such card")

    monkeypatch.setattr(ops, "measure", measure)
    monkeypatch.setattr(profiles, "machine", lambda: MACHINE)
    monkeypatch.setattr(profiles, "benches", lambda *_: [no_compiler("rotary"), no_compiler("adamw_")])
    monkeypatch.setattr(training_step, "run", no_training)
    profile = replace(profiles.PROFILES["smoke"], minutes=0.01, training=0.1)
    result = command.measured(command.Flags(profile="smoke"), profile)
    lost = [row for row in result["rows"] if row["op"] == "rotary"]
    assert {(row["way"], row["contender"]) for row in lost} == {
        (way, name) for way in ops.WAYS for name in CONTENDERS["rotary"] if name != "compiled"
    }
    assert {(row["status"], row["why"]) for row in lost} == {("failed", "OutOfMemoryError: CUDA out of memory")}
    assert any(row["op"] == "adamw_" and row["status"] == "timed" for row in result["rows"])
    text = markdown("", pages.sections({**result, "sensors": {}}))
    assert "OutOfMemoryError: CUDA out of memory" in text and "AssertionError: no such card" in text
    json.dumps(result, allow_nan=False)


# ---- what is measured


def test_every_op_has_contenders_cases_and_costs():
    assert set(CONTENDERS) == set(OPS) and set(PEERS) <= set(OPS)
    assert set(ops.BACKWARD) == {name for name, op in OPS.items() if op.differentiable}
    for name, op in OPS.items():
        assert list(CONTENDERS[name])[:3] == ["triton", "eager", "compiled"]
        for profile in profiles.PROFILES.values():
            assert profiles.chosen(op, profile)
    for name, profile in profiles.PROFILES.items():
        found = profiles.benches(list(OPS), profile)
        assert {bench.op.name for bench in found} == set(OPS), name


def test_cases_of_a_profile():
    quick = profiles.PROFILES["quick"]
    assert set(profiles.chosen(OPS["flash_attention"], quick)) == {"d12", "d24", "d24_full"}
    assert list(profiles.chosen(OPS["cross_entropy"], quick)) == ["d24"]  # d12 has 4.3 GB of logits
    assert list(profiles.chosen(OPS["polar_express"], quick)) == ["d24_attn", "d24_mlp"]
    assert list(profiles.chosen(OPS["flash_attention_decode"], profiles.PROFILES["smoke"])) == ["odd"]


def test_the_largest_case_is_the_one_compiled():
    found = profiles.benches(["rms_norm"], profiles.PROFILES["quick"])
    assert [(bench.case, "compiled" in bench.left_out) for bench in found] == [("d12", True), ("d24", False)]


@pytest.mark.parametrize("name", [name for name in PEERS])
def test_every_peer_that_can_run_here_passes_the_gate_in_float32_or_says_why_not(name):
    op = OPS[name]
    for setting, more in ops.SETTINGS.get(name, {"": {}}).items():
        case = narrow(op.cases["odd"])
        inputs = {**op.inputs(case, torch.float32, "cpu"), **more}
        gate = Gate(op, inputs, torch.float32)
        for who, contender in PEERS[name].items():
            why = obstacle(contender, inputs, CPU)
            verdict = None if why else gate.judge(contender)
            assert why or not verdict.why, (who, setting, verdict)


def test_a_package_that_is_missing_is_said():
    contender = Contender(lambda: None, needs="no_such_package")
    assert obstacle(contender, {}, torch.device("cuda")) == "no_such_package is not installed"
    assert obstacle(replace(contender, needs="torch"), {}, CPU) == "torch needs a CUDA device"


# ---- the gate


def wrong_result(x, weight):
    return 1.02 * OPS["rms_norm"].reference(x, weight)


def wrong_gradient(x, weight):
    right = OPS["rms_norm"].reference(x, weight)
    return right.detach() + 0.9 * (right - right.detach())


def breaks(x, weight):
    raise RuntimeError("out of resource: registers\nmore")


def no_number(x, weight):
    return OPS["rms_norm"].reference(x, weight) * float("nan")


@pytest.mark.parametrize(
    "wrong, why",
    [
        (wrong_result, "result 0 is off by 0.02"), (wrong_gradient, "result 1 is off by 0.1"),
        (no_number, "result 0 is off by"), (breaks, "RuntimeError: out of resource: registers"),
        (lambda x, weight: x[:1] * weight, "result 0 is (1, 100), wanted (37, 100)"),
    ],
)  # fmt: skip
def test_who_is_wrong_gets_no_speed(wrong, why):
    timed = []
    machine = replace(MACHINE, clock=lambda call: timed.append(call()) or 2.0)
    contenders = dict(eager=CONTENDERS["rms_norm"]["eager"], wrong=Contender(wrong))
    rows = ops.measure(no_compiler(), contenders, machine, lambda: 0.0, 3)
    found = [row for row in rows if row["contender"] == "wrong"]
    assert len(found) == 3
    for row in found:
        assert row["status"] == "failed" and why in row["why"]
        assert not {"median_ms", "gb_per_s", "times_eager", "roofline"} & set(row)
    assert len(timed) == 3 * (timer.WARMUP + 3)  # eager's alone
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize("name", ["torch", "torch, chunked"])
def test_a_loss_in_bfloat16_is_judged_by_plain_pytorchs(name):
    """Off by 0.0089 in the odd case: as F.linear and F.cross_entropy, and more than a float32 loss may be."""
    op, peer = OPS["linear_cross_entropy"], CONTENDERS["linear_cross_entropy"][name]
    inputs = {**op.inputs(op.cases["odd"], torch.bfloat16, "cpu"), "softcap": None}
    if why := obstacle(peer, inputs, CPU):
        pytest.skip(why)
    gate = Gate(op, inputs, torch.bfloat16)
    assert gate.judge(peer).why == ""
    assert "result 0 is off" in gate.judge(replace(peer, call=lambda **inputs: 1.05 * peer.call(**inputs))).why
    assert name != "torch" or "result 0 is off" in gate.judge(replace(peer, plain=None)).why


def test_at_full_size_answers_are_compared_too():
    op, inputs = OPS["rms_norm"], OPS["rms_norm"].inputs(dict(N=2000, C=16), torch.float32, "cpu")
    usual = answers(op, Contender(op.reference), inputs)

    def late_rows(x, weight):
        right = op.reference(x, weight)
        return torch.cat((right[:1500], 0 * right[1500:]))

    assert agreement(op, Contender(op.reference), inputs, usual, torch.float32) == ""
    assert "at full size result 0" in agreement(op, Contender(late_rows), inputs, usual, torch.float32)
    assert narrow(dict(N=2000, C=16)) == dict(N=1024, C=16)
    assert narrow(dict(B=4, T=9, H=2, K=1, D=8)) == dict(B=1, T=9, H=2, K=1, D=8)
    assert narrow(dict(K=24, m=3, n=5)) == dict(K=2, m=3, n=5)


# ---- times and rates


def test_the_timer_takes_turns_prepares_untimed_and_stops_when_late():
    happened = []

    def prepared(name):
        def prepare():
            happened.append(f"prepare {name}")
            return lambda: happened.append(name)

        return prepare

    def clock(call):
        call()
        return float(len(happened))

    samples = timer.in_turns(dict(a=prepared("a"), b=prepared("b")), 1e9, 4, clock)
    one = ["prepare a", "a", "prepare b", "b"]
    assert happened == one * (timer.WARMUP + 4)
    first = len(one) * timer.WARMUP
    assert samples == dict(a=[first + 2.0 + 4 * i for i in range(4)], b=[first + 4.0 + 4 * i for i in range(4)])
    assert len(timer.in_turns(dict(a=prepared("a")), 0.0, 100, clock)["a"]) == timer.LEAST
    assert timer.quartiles([4.0, 1.0, 2.0, 3.0, 100.0]) == (2.0, 3.0, 4.0)


def test_the_host_clock_counts_the_call_and_not_the_sweep(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: now[0])
    clock = tuning.clock("cpu")

    def call():
        now[0] += 0.25

    assert clock(call) == 250.0


def test_backward_is_timed_without_its_forward():
    passes = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            passes.append("forward")
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            passes.append("backward")
            return 2 * grad

    op = replace(OPS["rms_norm"], differentiable=("x",))
    inputs = dict(x=torch.ones(3, requires_grad=True))
    for way, before, during in (("forward", [], ["forward"]), ("backward", ["forward"], ["backward"]),
                                ("both", [], ["forward", "backward"])):  # fmt: skip
        prepare = ops.prepared(op, Contender(lambda x: Noted.apply(x)), inputs, way)
        for _ in range(2):
            passes.clear()
            run = prepare()
            assert passes == before and inputs["x"].grad is None
            passes.clear()
            run()
            assert passes == during


def test_the_setting_is_in_force_in_backward_too():
    seen = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(dispatch.mode("rms_norm"))
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            seen.append(dispatch.mode("rms_norm"))
            return 2 * grad

    op, inputs = replace(OPS["rms_norm"], differentiable=("x",)), dict(x=torch.ones(3, requires_grad=True))
    contender = Contender(lambda x: Noted.apply(x), setting="torch,rms_norm=triton")
    for way in ("backward", "both"):
        ops.prepared(op, contender, inputs, way)()()
    answers(op, contender, inputs)
    assert seen == ["triton"] * 6 and dispatch.mode("rms_norm") != "triton"


def test_peak_memory_is_above_what_lies_there_without_the_last_gradients(monkeypatch):
    now = dict(weights=1000, grads=300, peak=0)  # MB; the gradients are the call's before

    def prepare():
        now["grads"] = 0

        def call():
            now.update(grads=300, peak=max(now["peak"], now["weights"] + 300))

        return call

    def reset():
        now["peak"] = now["weights"] + now["grads"]

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: (now["weights"] + now["grads"]) * 2**20)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: now["peak"] * 2**20)
    assert ops.peak_mb(prepare) == 300


def test_only_who_passed_gets_copies_of_its_own(monkeypatch):
    made, real = [], ops.copied
    monkeypatch.setattr(ops, "copied", lambda *args: made.append(1) or real(*args))
    contenders = dict(eager=CONTENDERS["rms_norm"]["eager"], wrong=Contender(wrong_result, overwrites=True))
    ops.measure(no_compiler(), contenders, MACHINE, lambda: 0.0, 3)
    assert len(made) == 1


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.refuses(torch.float16)], ids=lambda op: op.name)
def test_what_is_promised_in_no_dtype_of_the_card_is_skipped_saying_so(op):
    """A T4 computes in float16."""
    bench = ops.Bench(op, next(iter(op.cases)), "")
    rows = ops.measure(bench, CONTENDERS[op.name], replace(MACHINE, dtype=torch.float16), lambda: 0.0, 3)
    assert {row["status"] for row in rows} == {"skipped"}
    assert {row["why"] for row in rows} == {f"{op.name} makes no promise for float16"}
    assert dispatch.unfit(op.name, torch.float16, 64, 0) == f"{op.name} makes no promise for float16"


def on_a_card(op: str, monkeypatch) -> list[str]:
    """Why our kernels are not judged, by a machine that looks like a GPU; where they are, "tried"."""
    monkeypatch.setattr(ops, "obstacle", lambda *of: "")
    ours, bench = dict(triton=Contender(broken)), ops.Bench(OPS[op], next(iter(OPS[op].cases)))
    case = OPS[op].cases[bench.case]
    verdicts = ops.judged(bench, ours, bench.inputs(case, MACHINE), MACHINE)
    return [verdict["why"] for verdict in verdicts.values()]


def broken(**inputs):
    raise RuntimeError("tried")


def test_what_an_architecture_refuses_is_skipped_saying_so(monkeypatch):
    monkeypatch.setattr(tuned, "architecture", lambda index: "sm_80")
    assert on_a_card("fp8_linear", monkeypatch) == ["sm_80 has no fp8 instructions"]
    assert on_a_card("rms_norm", monkeypatch) == ["RuntimeError: tried"]


def test_on_amds_cards_a_kernel_that_ends_its_compiler_is_skipped(monkeypatch):
    """Compiled in this process, it would end the suite."""
    monkeypatch.setattr(tuned, "architecture", lambda index: "gfx1100")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    crashed = lambda op, size, dtype, arch: "the compiler crashed (signal 11)" if op == "mix_rms_norm" else ""
    monkeypatch.setattr(child_compile, "compiles_in_child", crashed)
    assert on_a_card("mix_rms_norm", monkeypatch) == ["the compiler crashed (signal 11)"]
    assert on_a_card("rms_norm", monkeypatch) == ["RuntimeError: tried"]


@pytest.mark.parametrize("profile", ["quick", "smoke"])
@pytest.mark.parametrize("expands, tried", [(True, ["try"]), (False, [])])
def test_memory_is_allocated_as_in_a_training_before_cuda_starts(monkeypatch, profile, expands, tried):
    called = []
    monkeypatch.setattr(sys, "argv", ["benchmarks", "run", f"--profile={profile}"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "set_allocator", lambda: called.append("set") or expands)
    monkeypatch.setattr(command, "pick", lambda *asked: called.append("start") or "cuda")
    monkeypatch.setattr(command, "try_allocator", lambda device, rank: called.append("try"))
    monkeypatch.setattr(command, "measured", lambda *given: sys.exit())
    with pytest.raises(SystemExit):
        command.run()
    assert called == ["set", *(["start"] if profile == "quick" else []), *tried]


@pytest.mark.parametrize("card, device", [("GTX 1050", "cpu"), ("T4", "cuda")])
def test_a_card_that_torch_has_no_code_for_is_not_measured(monkeypatch, card, device):
    """It is said that the CPU is gone on with."""
    standins.gpus(monkeypatch, card)
    monkeypatch.setattr(profiles.tuning, "clock", lambda device: device)
    machine = profiles.machine()
    assert machine.device.type == machine.clock == device


def test_rates_by_hand():
    row = ops.rates(no_compiler(case="d4"), "both", MACHINE, [1.0, 2.0, 3.0])
    moved = 5 / 2 * 2 * 2048 * 256 * 4  # x twice, y, dy and dx in float32
    assert row["least_bytes"] == moved
    assert row["gb_per_s"] == pytest.approx(moved / 2e-3 / 1e9)
    assert row["roofline"] == pytest.approx(moved / 1e10 / 2e-3)
    unknown = ops.rates(no_compiler(case="d4"), "both", replace(MACHINE, flops=None, bandwidth=None), [1.0, 2.0, 3.0])
    assert unknown["roofline"] is None and unknown["gb_per_s"] == row["gb_per_s"]


def test_gradients_made_in_forward_are_compared_whole():
    loss = OPS["linear_cross_entropy"]
    assert ops.ways(loss, CONTENDERS[loss.name]["eager"].early) == ("both",)
    contenders = {
        "eager": CONTENDERS["cross_entropy"]["eager"],
        "early": Contender(OPS["cross_entropy"].reference, early=True),
    }
    rows = ops.measure(no_compiler("cross_entropy"), contenders, MACHINE, lambda: 0.0, 3)
    states = {row["way"]: row["status"] for row in rows if row["contender"] == "early"}
    assert states == dict(forward="skipped", backward="skipped", both="timed")


def test_a_cache_that_cannot_be_emptied_fails_no_bench(monkeypatch):
    """torch's allocator asserts after a capture that failed."""

    class Reached(Exception):
        pass

    def asserts():
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def reached(*_):
        raise Reached

    monkeypatch.setattr(torch.cuda, "empty_cache", asserts)
    monkeypatch.setattr(ops.Bench, "inputs", reached)
    with pytest.raises(Reached):
        ops.measure(no_compiler(), {}, replace(MACHINE, device=torch.device("cuda")), lambda: 0.0, 3)


# ---- the training step


def test_batches_are_drawn_before_one_is_asked_for(monkeypatch):
    data, again = (our_step.rows(2, 8, 16, 3) for _ in range(2))
    monkeypatch.setattr(our_step.np, "minimum", lambda *_: pytest.fail("drawn while a step is timed"))
    found = [next(data) for _ in range(4)]
    assert found[3] is found[0] and not torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for pair in zip(found, again) for a, b in zip(*pair))


TINY = training_step.Flags(1, 128, 16, 2, 3)


def test_a_training_step_against_itself(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)  # a minute otherwise; the slow test compiles
    monkeypatch.setattr(training_step, "can_compile", lambda device: (True, ""))
    result = training_step.run(TINY, setup("cpu"))
    assert "nothing is switched" in result["what"] and result["status"] == "timed"
    assert result["loss_difference"] == 0.0
    first, second = result["rows"]
    assert first["contender"] == "eager" and first["times_first"] == 1.0 and len(first["losses"]) == 6
    assert second["tok_per_s"] == pytest.approx(32 / second["step_ms"] * 1e3)
    assert first["losses"][-1] < first["losses"][0]
    assert all(name in " ".join(training_step.lines(result)) for name in ("eager", "compiled", "tok/s"))


@pytest.mark.parametrize(
    "memory, dtype, rows", [(79.1, torch.bfloat16, 16), (23.5, torch.bfloat16, 8), (14.6, torch.float16, 1)]
)
def test_both_models_of_a_training_step_fit_beside_each_other(memory, dtype, rows):
    card = SimpleNamespace(dtype=dtype, memory=int(memory * 2**30))
    assert training_step.fitting(training_step.Flags(), card, ["torch", "auto"]) == rows


def test_no_speed_when_the_losses_part(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    monkeypatch.setattr(training_step, "can_compile", lambda device: (True, ""))
    real, made = training_step.our_step, []

    def other_data(sizes, weights, hardware, data, B, compiled):
        made.append(next(data) if compiled else None)  # the second sees a batch further on
        step = real(sizes, weights, hardware, data, B, compiled)
        return (lambda: 1.1 * step()) if compiled else step

    monkeypatch.setattr(training_step, "our_step", other_data)
    result = training_step.run(TINY, setup("cpu"))
    assert result["status"] == "failed" and result["loss_difference"] > training_step.PARTED
    assert all(set(row) == {"contender", "losses"} for row in result["rows"])
    assert "tok/s" not in " ".join(training_step.lines(result))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "other, apart, together",
    [
        ([4.0, 2.02], 0.01, True), ([4.0, 2.2], 0.1, False), ([NAN, 2.0], 0.0, False), ([4.004, NAN], 0.001, False),
        ([4.0, INF], 0.0, False), ([NAN, NAN], 0.0, False),
    ],
)  # fmt: skip
def test_parity(other, apart, together):
    assert training_step.parity(dict(a=[4.0, 2.0], b=other)) == (pytest.approx(apart), together)
    if not together and apart < training_step.PARTED:
        assert not training_step.parity(dict(a=other, b=[4.0, 2.0]))[1]  # nor when the first is NaN


def test_a_loss_that_is_nan_is_null_in_the_file(monkeypatch):
    monkeypatch.setattr(training_step, "can_compile", lambda device: (True, ""))
    losses = [3.0, 3.0, NAN, 2.0, 2.0, 2.0]
    monkeypatch.setattr(training_step, "our_step", lambda *_: iter(losses).__next__)
    result = training_step.run(TINY, setup("cpu"))
    assert json.loads(json.dumps(result, allow_nan=False))["rows"][1]["losses"] == [3.0, 3.0, None, 2.0, 2.0, 2.0]
    assert result["status"] == "failed" and "a loss is not finite" in training_step.lines(result)[0]


@pytest.mark.parametrize("depth, width", [(1, 128), (4, 256), (5, 384), (7, 512), (12, 768)])
def test_every_depth_has_whole_heads(depth, width):
    sizes = GPTConfig(**training_step.config(training_step.Flags(depth)))
    assert (sizes.n_embd, sizes.n_layer, sizes.n_embd // sizes.n_head) == (width, depth, 128)


@pytest.mark.slow
def test_a_training_step_compiled(capsys):
    assert tiny.call_module("benchmarks.training_step", "--depth=1", "--vocab-size=512", "--sequence-len=64",
                            "--batch=4", "--steps=3") == 0  # fmt: skip
    result = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert result["status"] == "timed" and result["rows"][1]["times_first"] > 0
