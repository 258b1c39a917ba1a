"""--profile through the scripts, the page about a trace made by hand, and the three MFUs."""

import gc
import gzip
import json
import re
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_trace import GEMM, NORM, REDUCE, event, kernel, mark, step
from torch.profiler import ProfilerActivity, profile

from nanochat import hardware
from nanochat.cost import attended, decode_cost, flops_per_token, linear_params, training_flops
from nanochat.engine import Engine, Request, Sampling
from nanochat.gpt import GPTConfig
from nanochat.hardware import PEAKS
from nanochat.log import read_log
from nanochat.run import Run
from nanochat.trainer import Settings, State
from profiling.predicted import cards
from profiling.predicted.cards import Sheet, by_driver, card
from profiling.recorded import diff, record, step_page, step_sections, watch
from profiling.recorded.analysis import analyse
from profiling.recorded.mfu import predicted_ratio, rates, roofline_share, waterfall
from profiling.recorded.step_sections import Lab
from profiling.recorded.trace import parse
from scripts import chat_eval

SIZES = (
    "--depth=1 --aspect-ratio=16 --head-dim=16 --max-seq-len=32 --device-batch-size=4 --total-batch-size=256 "
    "--num-iterations=7 --eval-tokens=256 --compile=no"
).split()
H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A base directory with text, conversations, and a tokenizer in the runs "a" and "b"."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(dict(text=t)) + "\n" for t in tiny.sentences(600)))
    talks = [
        dict(messages=[dict(role="user", content=q), dict(role="assistant", content=a)])
        for q, a in zip(tiny.sentences(200, 1), tiny.sentences(200, 2))
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    for name in ("a", "b"):
        tiny.tokenizer().save(Run.open(name).stage("tokenizer"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small wait longer for threads than they compute
    yield tmp_path
    torch.set_num_threads(threads)


def facts(page):
    """The first table of a page."""
    return dict(re.findall(r"<tr><td>([^<]*)</td><td>([^<]*)</td></tr>", page))


def losses(name, stage):
    return [row["loss"] for row in read_log(Run.open(name).stage(stage) / "log.jsonl") if "loss" in row]


def test_recording_changes_no_loss_and_leaves_a_page(home, capsys):
    data = f"--data={home / 'text.jsonl'}"
    assert tiny.call("base_train", "--run=a", data, *SIZES) == 0
    assert tiny.call("base_train", "--run=b", data, *SIZES, "--profile=2") == 0
    assert losses("a", "base") == losses("b", "base")
    one, two = (Run.open(name).checkpoint("base").tensors("model") for name in ("a", "b"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    folder = Run.open("b").stage("base") / "profile"
    assert not (Run.open("a").stage("base") / "profile").exists()
    assert {path.name for path in folder.iterdir()} == {"trace-rank0.json.gz", "profile.json", "profile.html"}
    assert f"base: 2 steps recorded: {folder / 'profile.html'}" in capsys.readouterr().out
    found = diff.load(folder / "profile.json")
    assert len(found.step_ns) == 2 and not found.on_device
    assert {"data", "forward", "backward", "optimizer"} <= found.phase_ns.keys()
    about = found.meta
    assert (about["stage"], about["first_step"], about["tokens_per_step"], about["fp8"]) == ("base", 4, 256, None)
    page = (folder / "profile.html").read_text()
    assert "Profile of base, steps 5 to 6" in page and step_sections.ON_CPU in page
    assert "could not be made" not in page and "MFU" not in page.upper() and 'src="http' not in page
    assert "PREDICTED" not in page and "Nothing is predicted" not in page, "a CPU's operators are not predicted"
    assert not any(row["name"].startswith("prims::") for row in found.ops), "counting FLOPs lies in a recorded step"
    assert 0 < about["unrecorded_ms"] < 1e3 and 0 < about["recorded_ms"] <= max(found.step_ns) / 1e6
    assert "times as long (the shortest warm step" in page
    for cell in (">of the limit<", ">predicted / actual<", ">before the recording<"):
        assert cell not in page
    assert "No roofline: the limits of this CPU are not known." in page and page.count("<svg") == 2
    assert about["nvml"], "the sensors' rows, or why there are none, are in the trace"

    raw = json.loads(gzip.decompress((folder / "trace-rank0.json.gz").read_bytes()))
    assert (raw["distributedInfo"]["rank"], raw["distributedInfo"]["world_size"]) == (0, 1)

    assert not about["beside"] and "Not steps alone" not in page

    flags = (f"--data={home / 'chat.jsonl'}", "--num-iterations=6", "--eval-tokens=256", "--compile=no", "--profile=1",
             "--save-every=4", "--eval-every=4")  # fmt: skip
    assert tiny.call("chat_sft", "--run=b", *flags) == 0
    page = (Run.open("b").stage("sft") / "profile" / "profile.html").read_text()
    assert "Profile of sft, steps 5 to 5" in page
    assert "inside the recorded time lie checkpoint after step 4, evaluation after step 4." in page
    assert "what lay between the steps: checkpoint after step 4, evaluation after step 4." in page
    assert "how much is not known here" in page, "the only step has an evaluation in it"


def test_a_page_that_fails_does_not_end_training(home, capsys, monkeypatch):
    def fails(*_):
        raise RuntimeError("out of ink")

    monkeypatch.setattr(step_page, "write", fails)
    assert tiny.call("base_train", "--run=a", f"--data={home / 'text.jsonl'}", *SIZES, "--profile=1") == 0
    assert "trace-rank0.json.gz, but its page could not be made: out of ink" in capsys.readouterr().out
    assert len(losses("a", "base")) == 7
    assert record.__name__ not in {call.__module__ for call in gc.callbacks}, "it still listens"


@pytest.mark.parametrize("fails", ["start", "add_metadata_json", "export_chrome_trace"])
def test_a_recording_that_fails_lets_the_work_go_on(tmp_path, capsys, monkeypatch, fails):
    def fail(*_):
        raise OSError("no room")

    monkeypatch.setattr(record.profile, fails, fail)
    engine = Engine(tiny.model(), slots=2)
    recorder = record.engine_recorder(engine, 2, "two", tmp_path, hardware.setup("cpu"))
    made = list(engine.stream(Request([1, 2, 3, 4], 9, Sampling(0.0))))
    recorder.end()
    assert len(made) == 9 and capsys.readouterr().out == "two: not recorded: no room\n"
    assert (engine.after_step(), engine.part) == (None, nullcontext), "the engine is left as it was"
    assert record.__name__ not in {call.__module__ for call in gc.callbacks}, "it still listens"
    monkeypatch.undo()
    with profile(activities=[ProfilerActivity.CPU]):  # another can begin
        torch.ones(1).sum()


@pytest.mark.parametrize("steps, words", [(4, "--profile 4 needs 8 steps"), (-1, "--profile is -1")])
def test_too_few_steps_are_refused_before_training(home, capsys, steps, words):
    assert tiny.call("base_train", "--run=a", f"--data={home / 'text.jsonl'}", *SIZES, f"--profile={steps}") == 2
    assert words in capsys.readouterr().err and not losses("a", "base")


def trained(home, *flags):
    """A base model of 7 steps in the run "a"."""
    assert tiny.call("base_train", "--run=a", f"--data={home / 'text.jsonl'}", *SIZES, *flags) == 0


EVAL = ("--run=a", "--source=base", "--tasks=facts_taught", "--max-problems=5", "--batch-size=3", "--max-new-tokens=8")


def test_an_evaluation_is_recorded_and_answers_the_same(home, capsys):
    trained(home)
    assert tiny.call("chat_eval", *EVAL) == 0
    folder = Run.open("a").stage("eval")
    answers = (folder / "base_failures.jsonl").read_text()
    assert not (folder / "profile").exists()
    assert tiny.call("chat_eval", *EVAL, "--profile=2") == 0
    assert (folder / "base_failures.jsonl").read_text() == answers
    said = capsys.readouterr().out.strip().split("\n")
    assert "failing examples" in said[-2], "making the page is in nobody's seconds"
    assert said[-1].startswith(f"chat_eval: 2 steps recorded: {folder / 'profile' / 'profile.html'}")
    found = diff.load(folder / "profile" / "profile.json")
    assert len(found.step_ns) == 2 and {"decode", "sampling"} <= found.phase_ns.keys()
    assert not any(row["name"].startswith("prims::") for row in found.ops)
    assert found.meta["first_step"] == 4 and found.meta["flops_per_token"] == {}
    page = (folder / "profile" / "profile.html").read_text()
    assert "Profile of chat_eval, steps 5 to 6" in page and "could not be made" not in page
    assert "Nothing is trained, so there is no MFU." in page and "mfu" not in page and "<td>backward" not in page
    assert facts(page)["tokens made in a step"] == "3, one for each row" and facts(page)["decoding"] == "eager"


def test_of_several_ranks_one_records_an_evaluation(home, monkeypatch):
    """All have the same file to write."""
    trained(home)
    other = replace(hardware.setup("cpu"), rank=1)
    monkeypatch.setattr(chat_eval, "look_at_hardware", lambda device: other)
    assert tiny.call("chat_eval", *EVAL, "--profile=2") == 0
    assert not (Run.open("a").stage("eval") / "profile").exists()


def test_an_evaluation_with_too_few_steps_says_so_and_keeps_its_results(home, capsys):
    trained(home)
    for took in (2, 3, 5):  # before the profiler is on, while it gets warm, and while it records
        flags = (*EVAL, "--max-problems=3", f"--max-new-tokens={took}", "--profile=2")
        assert tiny.call("chat_eval", *flags) == 0
        said = capsys.readouterr().out
        assert "3 failing examples" in said
        needs = "chat_eval: not recorded: --profile 2 needs 6 steps, the first 4 to get warm"
        assert f"{needs}, and it took {took}, {6 - took} too few; ask more (--max-problems" in said
    assert not list((Run.open("a").stage("eval") / "profile").glob("*"))
    assert record.__name__ not in {call.__module__ for call in gc.callbacks}, "it still listens"
    assert tiny.call("chat_eval", *EVAL, "--profile=-1") == 2
    assert "--profile is -1" in capsys.readouterr().err


def test_a_recorder_knows_what_an_engine_did(tmp_path):
    """Two prompts, one of which joins while it is recorded: rows, keys and prompt tokens by hand."""
    engine = Engine(tiny.model(), slots=2)
    recorder = record.engine_recorder(engine, 2, "two", tmp_path, hardware.setup("cpu"))
    greedy = Sampling(0.0)
    engine.submit(Request([1, 2, 3, 4], 9, greedy))
    for number in range(record.WARM + 3):
        if number == record.WARM + 1:  # four passed
            engine.submit(Request(list(range(10, 30)), 9, greedy))
        engine.step()
    recorder.end()
    assert (engine.after_step(), engine.part) == (None, nullcontext), "the engine is left as it was"
    found = diff.load(tmp_path / "profile" / "profile.json")
    config, about = engine.config, found.meta["decoding"]
    made = [decode_cost(config, keys, 4) for keys in ([8, 20], [9, 21])]  # 3 prompt tokens, then one more in each step
    assert found.meta["tokens_per_step"] == 2 and about["prompt_tokens"] == 19 / 2
    assert (about["flops"], about["bytes"]) == tuple(sum(pair) / 2 for pair in zip(*made))
    assert {"prefill", "decode", "sampling"} <= found.phase_ns.keys() and not found.meta["beside"]
    assert (about["rows"], about["prompts"]) == ([2, 2], [19, 0])
    page = (tmp_path / "profile" / "profile.html").read_text()
    for number, took, read in zip((5, 6), found.step_ns, (19, 0)):
        assert f"<tr><td>{number}</td><td>{took / 1e6:.2f}</td><td>2</td><td>{read}</td></tr>" in page


def test_steps_of_rl_have_the_tokens_that_they_ran_and_no_mfu(tmp_path):
    """Its size of batch is none: most of such a step is decoding."""
    stage = SimpleNamespace(
        name="rl", folder=tmp_path, hardware=hardware.setup("cpu"), model=tiny.model(), state=State(), take=None,
        settings=Settings(9, 1, 64, 64), meta=dict(dtype="float32", plan={}), compile=False,
    )  # fmt: skip
    watched = watch.training(stage)
    for tokens in (100, 40, 7):
        stage.state.tokens += tokens
        watched.note()
    assert watched.about(2)["tokens_per_step"] == 64 and watched.about(2)["flops_per_token"]["mfu"] > 0
    stage.take = lambda *given: None
    assert watched.about(2)["tokens_per_step"] == 47 / 2 and watched.about(2)["flops_per_token"] == {}


def test_weights_of_8_bits_are_counted_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr("nanochat.engine.weights.fastest_product", lambda *_: "integers")
    engine = Engine(tiny.model(), 2, "int8")
    recorder = record.engine_recorder(engine, 1, "two", tmp_path, hardware.setup("cpu"))
    list(engine.stream(Request([1, 2, 3, 4], record.WARM + 2, Sampling(0.0))))
    recorder.end()
    about = diff.load(tmp_path / "profile" / "profile.json").meta["decoding"]
    assert about["bytes"] == decode_cost(engine.config, [5 + record.WARM], 4, 1)[1]


def test_a_pause_of_the_engine_inside_the_recorded_time_is_told(tmp_path):
    engine = Engine(tiny.model(), slots=2)
    recorder = record.engine_recorder(engine, 2, "two", tmp_path, hardware.setup("cpu"))
    for tokens in (5, 2):
        list(engine.stream(Request([1, 2, 3, 4], tokens, Sampling(0.0))))
    recorder.end()
    assert diff.load(tmp_path / "profile" / "profile.json").meta["beside"] == ["a pause of the engine after step 5"]


def test_only_steps_alike_tell_what_recording_costs(tmp_path, monkeypatch):
    """Each step lasts ten of its number's ms: 2 and 3 pass, of 5 to 8 the second reads a prompt, and the last follows a
    pause.
    """
    engine, now = Engine(tiny.model(), slots=2), 0.0
    monkeypatch.setattr(record.time, "perf_counter", lambda: now)
    recorder = record.engine_recorder(engine, 4, "two", tmp_path, hardware.setup("cpu"))
    engine.submit(Request([1, 2, 3, 4], 7, Sampling(0.0)))
    for number in range(1, 9):
        if number == 6:
            engine.submit(Request([7, 8, 9], 1, Sampling(0.0)))
        if number == 8:
            engine.submit(Request([5], 1, Sampling(0.0)))  # no prompt to read
        now += number / 100
        engine.step()
    recorder.end()
    about = diff.load(tmp_path / "profile" / "profile.json").meta
    assert (about["unrecorded_ms"], about["recorded_ms"]) == (pytest.approx(20), pytest.approx(60))
    assert recorder.ms == dict(unrecorded=pytest.approx([20, 30]), recorded=pytest.approx([50, 70]))


def test_garbage_collections_are_marked(tmp_path):
    mark = record._collections()
    gc.callbacks.append(mark)
    gc.disable()  # or there may be one by itself
    try:
        with profile(activities=[ProfilerActivity.CPU]) as made:
            gc.collect()
    finally:
        gc.enable()
        gc.callbacks.remove(mark)
    assert sum(e.name == "garbage collection" for e in made.events()) == 1


# ---- MFU


def test_flops_are_counted_in_three_ways():
    config = GPTConfig(512, 256, 2, 2, 2, 256, window_pattern="SL")  # windows 128 and 512
    pairs = sum(min(t, 129) for t in range(1, 513)) / 512 + sum(range(1, 513)) / 512  # its own key and 128 before
    found = training_flops(config)
    assert found["mfu"] == flops_per_token(config) == 6 * linear_params(config) + 12 * 256 * (128 + 512)
    assert found["mfu_causal"] == pytest.approx(6 * linear_params(config) + 12 * 256 * pairs)
    assert found["hfu"] - found["mfu_causal"] == pytest.approx(2 * 256 * pairs)


def test_pairs_are_those_of_the_mask():
    """A window as the attention understands it, at the standard pattern and context: 2371.125 keys a token."""
    config = GPTConfig(2048, 256, 4, 2, 2, 256, window_pattern="SSSL")
    queries, keys = torch.arange(2048)[:, None], torch.arange(2048)
    pairs = 0
    for layer in range(4):
        window = config.window(layer)
        seen = (keys <= queries) & (keys >= queries - (2048 if window is None else window))
        pairs += seen.sum().item()
    assert attended(config) == pairs / 2048 == 2371.125


def about(**more):
    flops = dict(mfu=4e9, mfu_causal=3e9, hfu=3.5e9)
    return dict(stage="base", first_step=3, tokens_per_step=1000, world=2, device=H100, dtype="torch.bfloat16",
                fp8=None, compiled=True, torch="2", flops_per_token=flops, **more)  # fmt: skip


SHAPES = {"Input Dims": [[4096, 4096], [4096, 4096]], "Input type": ["c10::BFloat16", "c10::BFloat16"]}


def gpu_trace(name=H100, **more):
    """A step of 1 ms: a product of 200 µs, a norm, an all-reduce half hidden, 300 µs idle."""
    listed = [
        step(0, 1000),
        mark("forward", 0, 500),
        mark("optimizer", 500, 1000),
        event("aten::mm", "cpu_op", 1, 9, **{"External id": 3, **SHAPES}),
        *kernel(GEMM, 100, 300, **{"External id": 3}),
        *kernel(NORM, 300, 500),
        *kernel(REDUCE, 400, 600, stream=9, launched=390),
        *kernel(GEMM, 600, 800),
    ]
    return dict(traceEvents=listed, deviceProperties=[dict(name=name)], nanochat={**about(), **more})


def test_mfu_by_hand():
    found = analyse(parse(gpu_trace()))
    said = rates(found, card("H100"))
    assert said["tok_per_s"] == pytest.approx(1e6)
    for name, flops in found.meta["flops_per_token"].items():
        assert said[name] == pytest.approx(flops * 1e6 / 2 / 989e12)  # two cards
    assert not any(name.endswith("fp8") for name in said)
    small = rates(analyse(parse(gpu_trace(fp8="current"))), card("H100"))
    assert small["mfu_fp8"] == pytest.approx(small["mfu"] * 989 / 1979)


DECODED = dict(how="graphs", flops=4e9, bytes=1e9, prompt_tokens=0.0)


def test_shares_of_decoding_by_hand():
    said = rates(analyse(parse(gpu_trace(decoding=DECODED, flops_per_token={}, world=1))), card("H100"))
    assert said == pytest.approx(
        dict(step_s=1e-3, tok_per_s=1e6, bandwidth_use=1e9 / 1e-3 / 3.35e12, flop_use=4e9 / 1e-3 / 989e12)
    )
    assert "flop_use" not in rates(analyse(parse(gpu_trace(decoding=DECODED))), None)


def test_the_bars_are_the_step():
    found = analyse(parse(gpu_trace()))
    chip = card("H100")
    bars = {label: ns for label, ns, _ in waterfall(found, chip)}
    assert sum(bars.values()) == found.wall_ns == 1_000_000
    flops = 2 * 4096**3
    assert bars["matrix products, at the peak"] == pytest.approx(1e9 * flops / 989e12, abs=1)
    assert sum(ns for label, ns in bars.items() if label.startswith("…")) == pytest.approx(
        200_000 - 1e9 * flops / 989e12, abs=1
    )
    assert bars["communication, exposed"] == 100_000 and bars["idle"] == 300_000 and bars["optimizer"] == 200_000
    unknown = waterfall(found, None)
    assert sum(ns for _, ns, _ in unknown) == found.wall_ns and unknown[0][0] == "matrix products"


@given(st.lists(st.tuples(st.sampled_from([GEMM, NORM, REDUCE]), st.integers(0, 900), st.integers(1, 300)), min_size=1))
def test_the_bars_are_the_step_whatever_ran(drawn):
    listed = [step(0, 1000), event("aten::mm", "cpu_op", 1, 9, **{"External id": 3, **SHAPES})]
    for i, (name, at, took) in enumerate(drawn):
        listed += kernel(name, at, at + took, **({"External id": 3} if i % 2 else {}))
    found = analyse(parse(dict(traceEvents=listed)))
    for chip in (None, card("H100"), by_driver("NVIDIA H100 PCIe")):
        assert sum(ns for _, ns, _ in waterfall(found, chip)) == found.wall_ns


def test_share_of_the_limit_by_hand():
    row = dict(flops=int(989e12 / 1e3), flops_ns=2_000_000, bytes=int(3.35e12 / 1e3), bytes_ns=4_000_000, fp8=False)
    assert roofline_share(row, card("H100")) == pytest.approx(0.5)
    assert roofline_share(dict(row, flops=0, flops_ns=0), card("H100")) == pytest.approx(0.25)
    assert roofline_share(row, None) is None


NORM_SHAPES = {"Input Dims": [[4096, 16384], [4096, 16384]], "Input type": ["c10::BFloat16", "c10::BFloat16"]}


def predicted_rows(*listed, card_name="H100"):
    """name → what is predicted of it, on a card without a calibration."""
    found = analyse(parse(dict(traceEvents=[step(0, 1000), *(e for entry in listed for e in entry)])))
    return {row["name"]: predicted_ratio(row, replace(card(card_name), calibrated="")) for row in found.ops}


def launched(name, op, at, took, shapes, number):
    """A kernel of an operator with shapes."""
    about = {"External id": number, **shapes}
    return [event(op, "cpu_op", 1 + number, 2 + number, **about), *kernel(name, at, at + took, **about)]


def test_predicted_over_actual_by_hand(monkeypatch, tmp_path):
    monkeypatch.setattr(cards, "FOLDER", tmp_path)  # fitted constants
    streaming = "triton_poi_fused_relu_0"
    said = predicted_rows(
        launched(GEMM, "aten::mm", 100, 200, SHAPES, 1),
        launched(GEMM, "aten::mm", 300, 100, SHAPES, 2),
        launched(streaming, streaming, 400, 100, NORM_SHAPES, 3),
        launched(NORM, NORM, 500, 100, NORM_SHAPES, 4),  # a reduction in a loop
    )
    chip = card("H100")
    once = 2 * 4096**3 / chip.products()
    assert said[GEMM] == (pytest.approx(2 * once / 300e-6), 0.35)
    moved = 2 * 2 * 4096 * 16384
    assert said[streaming] == (pytest.approx(moved / chip.stream / 100e-6), 0.30)
    assert said[NORM] == (said[streaming][0], None)


@pytest.mark.parametrize(
    "name, op, shapes",
    [
        (GEMM, "aten::mm", {}),
        (GEMM, "aten::mm", {**SHAPES, "Input type": ["float", "float"]}),  # at another rate than the peak's
        (GEMM, "aten::mm", {**SHAPES, "Input type": ["short int", "short int"]}),
        (GEMM, "aten::mm", {"Input Dims": SHAPES["Input Dims"]}),
        ("triton_tem_fused_mm_0", "triton_tem_fused_mm_0", NORM_SHAPES),  # multiplies, nobody knows how much
        ("elementwise_kernel", "aten::add", NORM_SHAPES),
    ],
)
def test_where_the_cost_is_not_known_nothing_is_predicted(name, op, shapes):
    assert predicted_rows(launched(name, op, 100, 200, shapes, 1))[name] is None


def test_a_call_that_the_window_cuts_is_not_compared():
    whole, cut = launched(GEMM, "aten::mm", 500, 200, SHAPES, 1), launched(GEMM, "aten::mm", -100, 200, SHAPES, 2)
    assert predicted_rows(whole, cut) == predicted_rows(whole) and predicted_rows(cut)[GEMM] is None


def test_fp8_products_are_predicted_at_their_own_rate_or_not():
    small = {**SHAPES, "Input type": ["c10::Float8_e4m3fn"] * 2}
    ran = launched(GEMM, "aten::_scaled_mm", 100, 200, small, 1)
    chip = card("H100")
    assert predicted_rows(ran)[GEMM][0] == pytest.approx(2 * 4096**3 / chip.products(fp8=True) / 200e-6)
    assert predicted_rows(ran, card_name="A100")[GEMM] is None


# ---- the page


@pytest.fixture
def page(tmp_path):
    """page(trace, card): the page's text, through the command."""

    def make(content, *flags):
        path = tmp_path / "trace.json"
        path.write_text(json.dumps(content))
        code = tiny.call_module("profiling.__main__", "trace", str(path), *flags)
        return code, (tmp_path / "trace.profile.html").read_text() if code == 0 else ""

    return make


def test_the_page_of_a_gpu_trace(page, capsys):
    row = dict(name=H100, driver="1", power_limit_w=700.0, sm_clock_mhz=1500, memory_clock_mhz=2619, power_w=690.0,
               temperature_c=60, memory_used_bytes=1 << 34, throttle=["software power cap"])  # fmt: skip
    code, text = page(gpu_trace(nvml=[dict(row, t=0.0), dict(row, t=0.1)]))
    assert code == 0 and "could not be made" not in text
    said = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert said["card"] == "H100" and said["step_ms"] == 1.0 and said["mfu"] == pytest.approx(4e9 * 1e6 / 2 / 989e12)
    ratio = 2 * 4096**3 / card("H100").products() / 200e-6
    assert f"<td>{ratio:.2f} ±35%</td>" in text and "PREDICTED for these shapes on a H100" in text
    for words in (f"{said['mfu']:.1%} of the bf16 peak", "software power cap", "the card&#x27;s roof", GEMM, "16.0"):
        assert words in text, words


def test_the_page_of_decoding_on_a_gpu(page):
    code, text = page(gpu_trace(decoding=DECODED, flops_per_token={}, world=1))
    assert code == 0 and "could not be made" not in text and "mfu" not in text and "hfu" not in text
    assert "29.9% of the memory&#x27;s bandwidth" in text and "0.4% of the bf16 peak" in text
    assert facts(text)["decoding"] == "graphs" and "compiled" not in facts(text)
    assert "rows decoding" not in text, "recorded before steps were told apart"
    many = [step(1000 * i, 1000 * (i + 1)) for i in range(1, step_sections.STEPS + 3)]
    content = gpu_trace(decoding=dict(DECODED, rows=[4] * 99, prompts=[1234] * 99))
    content["traceEvents"] += many
    code, text = page(content)
    assert code == 0 and text.count("<td>4</td><td>1,234</td>") == step_sections.STEPS and "And 3 more steps." in text
    code, text = page(gpu_trace("?", decoding=DECODED, flops_per_token={}, world=1))
    assert code == 0 and facts(text)["flop_use"].startswith("unknown peak")


def test_float32_is_not_held_against_peaks_of_16_bits(page):
    code, text = page(gpu_trace(dtype="torch.float32"))
    assert code == 0 and facts(text)["mfu"].startswith("unknown peak") and "could not be made" not in text


def test_the_page_of_rl_on_a_gpu(page):
    code, text = page(gpu_trace(flops_per_token={}))
    assert code == 0 and "no MFU" in text and not {"mfu", "mfu_causal", "hfu"} & facts(text).keys()


def test_the_page_says_what_recording_cost(page):
    """Of decoding at batch 1 nearly all is the recorder; of a step of training a few hundredths."""
    for before, factor, warns in ((0.75, "6.0", True), (4.4, "1.0", False), (3.4, "1.3", True)):
        code, text = page(gpu_trace(unrecorded_ms=before, recorded_ms=4.51))
        assert (
            code == 0 and f"{before:.2f} ms a step unrecorded, " in text and f"recorded: {factor} times as long" in text
        )
        assert ("Trust the shares among long operators" in text) == warns and "read no prompt" not in text
    sentence = "against the mean of it, of those that read no prompt)"
    assert sentence in page(gpu_trace(unrecorded_ms=1.0, recorded_ms=1.0, decoding=DECODED))[1]
    for missing in ({}, dict(unrecorded_ms=1.0, recorded_ms=None)):
        assert "how much is not known here" in page(gpu_trace(**missing))[1]
    assert page(gpu_trace(unrecorded_ms=0, recorded_ms=1.0))[0] == 2


def test_an_unknown_card_has_an_unknown_peak(page, capsys):
    code, text = page(gpu_trace("NVIDIA H100 80GB HBM3e"))
    assert code == 0 and text.count("unknown peak") == 4 and "of the bf16 peak" not in text
    assert "PREDICTED" not in text and "of the limit" not in text
    assert "No roofline: the limits of this card are not known." in text
    said = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert said["card"] is None and "mfu" not in said
    code, text = page(gpu_trace("NVIDIA H100 80GB HBM3e"), "--card=H200")
    assert code == 0 and "unknown peak" not in text
    assert page(gpu_trace(), "--card=H300")[0] == 2
    assert "--card 'H300' is not known" in capsys.readouterr().err


@pytest.mark.parametrize("name, peak", [("NVIDIA H100 PCIe", 756), ("NVIDIA A100-PCIE-40GB", 312)])
def test_a_card_of_which_only_the_peak_is_known_has_its_mfu_and_no_prediction(page, capsys, name, peak):
    code, text = page(gpu_trace(name))
    said = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert code == 0 and said["card"] == name and said["mfu"] == pytest.approx(4e9 * 1e6 / 2 / (peak * 1e12))
    assert f"{said['mfu']:.1%} of the bf16 peak" in text and "unknown peak" not in text
    assert f"{name}: peak {peak} TFLOP/s in bf16; how much of it products can reach is not known" in text
    assert "could not be made" not in text and "the card&#x27;s roof" in text and "best rate" not in text
    assert f"Nothing is predicted for a {name}: only its peaks are known." in text and "PREDICTED" not in text
    assert page(gpu_trace("?"), f"--card={name}")[0] == 0
    assert json.loads(capsys.readouterr().out.strip().split("\n")[-1])["mfu"] == said["mfu"]


def test_all_tables_of_cards_agree():
    for name, peak in PEAKS.items():
        chip = by_driver(name)
        assert chip and (chip.bf16, chip.fp8, chip.memory) == pytest.approx(
            (peak.bf16 * 1e12, (peak.fp8 or 0) * 1e12, peak.bandwidth * 1e12)
        )
        assert isinstance(chip, Sheet) or chip == card(chip.name) and chip.driver == name
    for name in ("NVIDIA H100", "NVIDIA H100 PCIE", "NVIDIA H100 80GB HBM3 ", "nvidia h200", ""):
        assert by_driver(name) is None, "a look-alike"


def test_a_trace_of_somebody_elses(page):
    listed = [entry for entry in kernel(GEMM, 0, 100) if entry["cat"] == "kernel"]  # no steps, no names, no shapes
    code, text = page(listed)
    assert code == 0 and "could not be made" not in text
    for words in (
        "Profile of a recorded trace",
        "the trace does not say what was trained",
        "No kernel has both FLOPs and bytes known",
        "The trace holds no allocations",
        "No sensors were recorded with this trace",
        "unknown peak (the trace names no card)",
        "There was no gap",
    ):
        assert words in text, words


def test_memory_of_a_cpu_is_what_was_allocated_while_recording():
    held = dict(peak_bytes=7 << 20, by_phase={"forward": 5 << 20, "before the recording": 2 << 20})
    found = replace(analyse(parse(gpu_trace())), memory=held)
    text, table = step_sections.memory(Lab(found, None, "x"))
    assert text.startswith("At the fullest moment 7.0 MiB") and len(table.rows) == 2
    text, table = step_sections.memory(Lab(replace(found, on_device=False), None, "x"))
    assert text.startswith("At the fullest moment 5.0 MiB") and table.rows == [("forward", "5.0")]
    nothing = replace(found, on_device=False, memory=dict(held, by_phase={"before the recording": 7 << 20}))
    assert len(step_sections.memory(Lab(nothing, None, "x"))) == 1


def test_a_part_that_fails_leaves_the_others(monkeypatch):
    def fails(*_):
        raise ValueError("no ink")

    monkeypatch.setattr(step_sections.step_plots, "waterfall", fails)
    made = {s.title: s.blocks for s in step_page.sections(Lab(analyse(parse(gpu_trace())), card("H100"), "x"))}
    assert made["Where a step goes"] == ["This part could not be made: no ink"]
    assert len(made) == 10 and not any("could not" in str(b) for t, b in made.items() if t != "Where a step goes")
