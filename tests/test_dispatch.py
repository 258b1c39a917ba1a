"""Which implementation runs, and that wrong use is one clear error."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import standins
import tiny
import torch

import kernels
from kernels import OPS, dispatch, measured, triton_utils, tuned
from kernels.attention import backends

ROOT = Path(__file__).parent.parent
needs_triton = pytest.mark.skipif(not triton_utils.INSTALLED, reason="Triton is not installed")


def run(*words, path=(), **variables):
    environment = {
        key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "NANOCHAT_KERNELS")
    }
    environment |= {
        "PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        **variables,
    }
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, env=environment)


def test_settings():
    assert dispatch.parse("auto") == {"*": "auto"}
    assert dispatch.parse("torch,rms_norm=triton, rotary=auto") == {
        "*": "torch",
        "rms_norm": "triton",
        "rotary": "auto",
    }
    assert dispatch.parse("rms_norm=torch") == {"*": "auto", "rms_norm": "torch"}
    for wrong in ("", "cuda", "auto,softmax=torch", "rms_norm=fast", "=torch"):
        with pytest.raises(ValueError, match="wanted auto, torch, triton"):
            dispatch.parse(wrong)


def test_an_op_without_a_kernel_cannot_be_asked_for_in_triton(monkeypatch):
    monkeypatch.setattr(tuned, "ops", lambda: ["rms_norm"])
    with pytest.raises(ValueError, match="rotary has no Triton kernel; those that have are rms_norm"):
        dispatch.parse("auto,rotary=triton")


def test_use_is_undone_even_after_an_error():
    before = dispatch.mode("rms_norm")
    with kernels.use("torch"):
        with pytest.raises(RuntimeError), kernels.use("rms_norm=triton"):
            assert dispatch.mode("rms_norm") == "triton" and dispatch.mode("rotary") == "auto"
            raise RuntimeError
        assert dispatch.mode("rms_norm") == "torch"
    assert dispatch.mode("rms_norm") == before


@pytest.mark.slow
def test_the_environment_is_read_and_a_wrong_one_is_one_sentence():
    code = "import torch, kernels; kernels.rms_norm(torch.ones(2, 4)); print(kernels.describe()[0])"
    assert "asked for" in run("-c", code, NANOCHAT_KERNELS="torch").stdout
    for words in (("-m", "kernels"), ("-m", "scripts.base_train")):
        made = run(*words, NANOCHAT_KERNELS="fast")
        assert made.returncode == 2 and made.stderr.count("\n") == 1, made.stderr
        assert "'fast' is not understood; wanted auto, torch, triton" in made.stderr


def test_on_a_cpu_the_reference_runs_unless_asked_otherwise(monkeypatch):
    monkeypatch.setattr(dispatch, "_modes", {"*": "auto"})
    assert not any(dispatch.triton_runs(name, torch.ones(2), 2) for name in tuned.ops())


def test_describe_names_every_op():
    rows = kernels.describe()
    assert [row[0] for row in rows] == list(OPS)
    assert all(implementation in ("torch", "triton", "error") and why for _, implementation, why in rows)
    made = run("-m", "kernels", CUDA_VISIBLE_DEVICES="")
    assert made.returncode == 0 and all(name in made.stdout for name in OPS)


@pytest.mark.parametrize("name", tuned.ops())
def test_triton_without_interpreter_or_gpu_is_refused(name, monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    op = OPS[name]
    inputs = op.inputs(min(op.cases.values(), key=lambda case: op.bytes(case, torch.float32)), torch.float32, "cpu")
    with (
        kernels.use("triton"),
        pytest.raises(ValueError, match=f"{name}: Triton is asked for .* is on cpu, wanted cuda"),
    ):
        op.fn(**inputs)
    monkeypatch.setattr(dispatch, "INSTALLED", False)
    with kernels.use("triton"), pytest.raises(ValueError, match=f"{name}: .*pip install triton"):
        op.fn(**inputs)


@needs_triton
@pytest.mark.parametrize("name", tuned.ops())
def test_a_dtype_without_kernels_is_refused(name):
    op = OPS[name]
    inputs = op.inputs(min(op.cases.values(), key=lambda case: op.bytes(case, torch.float32)), torch.float64, "cpu")
    with (
        kernels.use("triton"),
        pytest.raises(ValueError, match=f"{name}: .*float64, wanted float32, bfloat16 or float16"),
    ):
        op.fn(**inputs)


@needs_triton
def test_a_row_too_long_for_a_program_is_refused():
    with kernels.use("triton"), pytest.raises(ValueError, match="rms_norm: .*a row has 20000 elements, wanted at most"):
        kernels.rms_norm(torch.ones(1, 20000))


X, W, T = torch.ones(4, 6), torch.ones(9, 6), torch.tensor([0, 1, 8, -1])
WRONG = {
    "mix_rms_norm: x0 is on": lambda: kernels.mix_rms_norm(X, X.to("meta"), torch.ones(1), torch.ones(1)),
    "mix_rms_norm: b has 1 elements, none at index 1": lambda: kernels.mix_rms_norm(
        X, X, torch.ones(2), torch.ones(1), index=1
    ),
    r"add_rms_norm: delta is \(4, 5\)": lambda: kernels.add_rms_norm(X, X[:, :5]),
    r"rms_norm: weight is \(5,\)": lambda: kernels.rms_norm(X, torch.ones(5)),
    "rms_norm: x is torch.int64": lambda: kernels.rms_norm(X.long()),
    r"rotary: x is \(4, 6\)": lambda: kernels.rotary(X, X, X),
    r"rotary: cos is \(3, 2\)": lambda: kernels.rotary(torch.ones(1, 3, 1, 6), torch.ones(3, 2), torch.ones(3, 2)),
    "cross_entropy: targets are torch.int32": lambda: kernels.cross_entropy(X, T.int()),
    "cross_entropy: targets hold 8, wanted 0 to 5": lambda: kernels.cross_entropy(X, T),
    "cross_entropy: targets hold -1, wanted 0 to 8": lambda: kernels.linear_cross_entropy(X, W, T, ignore_index=-100),
    "cross_entropy: targets hold 9": lambda: kernels.linear_cross_entropy(X, W, T + 1),
    "cross_entropy: reduction is 'max'": lambda: kernels.cross_entropy(X, T - 3, reduction="max"),
    r"cross_entropy: targets are \(3,\)": lambda: kernels.cross_entropy(X, T[:3]),
    r"linear_cross_entropy: weight is \(9, 5\)": lambda: kernels.linear_cross_entropy(X, W[:, :5], T),
    "polar_express: steps is 6": lambda: kernels.polar_express(X, 6),
    r"newton_schulz: g is \(4,\)": lambda: kernels.newton_schulz(X[:, 0]),
    r"adamw_: grad is \(4, 5\)": lambda: kernels.adamw_(X, X[:, :5], X, X, 1, 0.1, 0.9, 0.9, 1e-8, 0.0),
    r"muon_update_: second_moment is \(1, 4, 1\), wanted \(1, 1, 6\)": lambda: kernels.muon_update_(
        X[None], X[None], torch.ones(1, 4, 1), 0.1, 0.0, 0.9
    ),
}


@needs_triton
@pytest.mark.parametrize("setting", ["torch", "triton"])
@pytest.mark.parametrize("message", WRONG)
def test_wrong_use_names_op_argument_found_and_wanted(message, setting):
    with kernels.use(setting), pytest.raises(ValueError, match=message):
        WRONG[message]()


# ---- probing a card, with stand-ins


@pytest.fixture
def h100(monkeypatch):
    """A card of compute capability 9.0 on which nothing was tried yet, and nothing runs: probes are stand-ins."""
    monkeypatch.setattr(dispatch, "_DECIDED", {})
    monkeypatch.setattr(dispatch, "_TRIED", {})
    monkeypatch.setattr(dispatch, "INSTALLED", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(tuned, "architecture", lambda index: "sm_90")
    monkeypatch.setattr(measured, "_adopted", {})  # nothing of this machine's own
    return monkeypatch


def test_a_failed_probe_is_said_once_and_falls_back_for_this_configuration(h100):
    def broken(op, dtype, size, device):
        if size == 128:
            raise RuntimeError("out of resource: shared memory, Required: 98304\nHardware limit: 65536")

    h100.setattr(dispatch.probing, "check", broken)
    with pytest.warns(UserWarning, match=r"flash_attention \(float16, size 128\) runs on PyTorch, .*: out of resource"):
        assert "98304" in dispatch.refusal("flash_attention", torch.float16, 128, 0)
    assert dispatch.refusal("flash_attention", torch.float16, 128, 0)  # a second warning would be an error
    assert dispatch.refusal("flash_attention", torch.float16, 64, 0) == ""
    assert dispatch.refusal("rotary", torch.bfloat16, 64, 0) == ""


def test_a_probe_that_breaks_the_gpu_ends_with_what_to_do(h100):
    """PyTorch cannot take over: the next call on the card would raise the same."""

    def broken(*_):
        torch.cuda.synchronize()

    h100.setattr(dispatch.probing, "check", broken)
    h100.setenv("NANOCHAT_KERNELS", "auto,rotary=torch")
    standins.lost(h100)
    said = r"rms_norm \(bfloat16, size 64\): CUDA error: an illegal memory access .*; this .* no more: start again"
    with pytest.raises(dispatch.Lost, match=said + " with NANOCHAT_KERNELS=auto,rotary=torch,rms_norm=torch$"):
        dispatch.refusal("rms_norm", torch.bfloat16, 64, 0)
    h100.setattr(torch.cuda, "synchronize", lambda *_: None)
    h100.setattr(dispatch.probing, "check", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="runs on PyTorch"):
        assert dispatch.refusal("rms_norm", torch.bfloat16, 128, 0)


def test_a_script_that_loses_its_gpu_ends_with_one_sentence(capsys):
    def main():
        raise dispatch.Lost("rms_norm: an illegal memory access; start again with NANOCHAT_KERNELS=auto,rms_norm=torch")

    assert tiny.called(main) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: rms_norm: an illegal memory access; start again") and error.count("\n") == 1


def test_what_a_capture_forbids_breaks_no_gpu(h100):
    standins.lost(h100)

    def forbidden(*_):
        raise torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing")

    h100.setattr(torch.cuda, "synchronize", forbidden)
    dispatch.check_alive("rms_norm", "")


def test_an_attention_of_another_package_that_breaks_the_gpu_is_named(h100):
    standins.lost(h100)
    h100.setattr(dispatch, "with_memory", lambda call: torch.cuda.synchronize())
    h100.setitem(sys.modules, "made_up", SimpleNamespace(flash_attn_func=None))
    backend = replace(next(iter(backends.BACKENDS.values())), module="made_up")
    with pytest.raises(dispatch.Lost, match="flash_attention: .* does not work here .*,flash_attention=torch$"):
        backends._outcome(backend, torch.bfloat16, 64, torch.device("cuda", 0))


def test_cards_below_8_0_take_kernels_only_where_measured(h100):
    h100.setattr(dispatch.probing, "check", lambda *_: None)
    h100.setattr(torch.cuda, "get_device_capability", lambda index=None: (7, 5))
    assert "capability 7.5" in dispatch.refusal("rms_norm", torch.float16, 768, 0)
    row = dict(dtype="*", config=dict(elements=1), ms=1.0, reference_ms=2.0)
    h100.setattr(tuned, "table", lambda arch: dict(rms_norm=[row]) if arch == "sm_90" else dict(rms_norm=[]))
    dispatch.forget()
    assert dispatch.refusal("rms_norm", torch.float16, 768, 0) == ""


def test_an_unproven_op_is_left_to_the_compiler_until_it_was_measured(h100):
    h100.setattr(dispatch.probing, "check", lambda *_: None)
    assert "no measurement" in dispatch.refusal("mlp_relu2", torch.bfloat16, 4096, 0)


@pytest.mark.parametrize("name, runs", [("mlp_relu2", False), ("cross_entropy", True)])
def test_an_unproven_op_must_be_faster_and_others_not_much_slower(h100, monkeypatch, name, runs):
    h100.setattr(dispatch.probing, "check", lambda *_: None)
    for ms, reference_ms, taken in [(1.0, 1.01, True), (1.0, 0.97, runs), (1.0, 0.9, False)]:
        row = dict(dtype="bfloat16", config={}, ms=ms, reference_ms=reference_ms)
        monkeypatch.setattr(tuned, "rows", lambda *_, row=row: [row])
        dispatch.forget()
        assert (dispatch.refusal(name, torch.bfloat16, 768, 0) == "") == taken


def test_probes_of_many_threads_leave_the_setting_as_it_was(h100):
    """Replicas probe in threads, while others compute: nobody may see another's setting."""
    import threading
    import time

    seen = []

    def slow(op, dtype, size, device):
        seen.append(dict(dispatch._modes))
        time.sleep(0.01)
        seen.append(dict(dispatch._modes))

    h100.setattr(dispatch.probing, "check", slow)
    before = dict(dispatch._modes)
    ops = [name for name in tuned.ops() if name not in tuned.UNPROVEN][:8]
    threads = [
        threading.Thread(target=dispatch.refusal, args=(name, torch.bfloat16, 64 * (i + 1), i))
        for i in range(4)
        for name in ops
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(threads) == 32 and len(seen) == 64
    assert all(modes == before for modes in [*seen, dispatch._modes])


def test_looking_at_the_machine_probes_nothing(h100):
    """Every rank does it before it has chosen its card, and so does a run on the CPU."""
    from nanochat import hardware

    h100.setattr(dispatch, "probe", lambda *_: pytest.fail("probed"))
    h100.setattr(torch.cuda, "is_available", lambda: True)
    assert hardware.setup("cpu").device.type == "cpu"


def test_a_measured_table_decides(tmp_path, monkeypatch):
    (tmp_path / "default.json").write_text((tuned.FOLDER / "default.json").read_text())
    rows = [
        dict(dtype="bfloat16", up_to=1024, config=dict(elements=1, num_warps=1), ms=2.0, reference_ms=1.0),
        dict(dtype="bfloat16", up_to=4096, config=dict(elements=2, num_warps=2), ms=1.0, reference_ms=2.0),
    ]
    import json

    (tmp_path / "sm_99.json").write_text(json.dumps(dict(rms_norm=rows)))
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(tuned, "architecture", lambda index: "sm_99")
    monkeypatch.setattr(measured, "_adopted", {})
    tuned.table.cache_clear()
    device = torch.device("cuda", 0)
    verdict = lambda op, dtype, size, compiled=True: tuned.verdict(op, dtype, size, device, compiled)
    assert verdict("rms_norm", torch.bfloat16, 512) == (
        False,
        "measured on this kind of card: 2 ms, 1 by torch.compile",
    )
    assert verdict("rms_norm", torch.bfloat16, 2048) == (
        True,
        "measured on this kind of card: 1 ms, 2 by torch.compile",
    )
    taken, rule = verdict("rms_norm", torch.float32, 512)  # not measured
    assert taken and rule.startswith("default")
    taken, rule = verdict("mlp_relu2", torch.float32, 512)  # nor is this one, which must be
    assert not taken and rule.startswith("default")
    assert tuned.config("rms_norm", torch.bfloat16, 2048, device)["elements"] == 2
    assert tuned.config("rms_norm", torch.bfloat16, 8192, device)["elements"] == 16384  # the static row
    with pytest.raises(ValueError, match="no row of kernels/tuned/default.json"):
        tuned.config("rms_norm", torch.bfloat16, 10**6, device)
    tuned.table.cache_clear()


COUNTS = dict(
    sm_90=dict(
        rms_norm=dict(streaming=1.01, peak=0.99, flops=1.0),  # less memory
        rotary=dict(streaming=1.0, peak=1.0, flops=1.0),  # a tie
        mlp_relu2=dict(streaming=0.9, peak=1.0, flops=1.0),
    )
)


@pytest.fixture
def counts(h100):
    """Such counts beside the tables that are there; nothing was measured."""
    table = tuned.table
    h100.setattr(tuned, "table", lambda name: dict(default=table("default"), counts=COUNTS).get(name, {}))
    h100.setattr(dispatch.probing, "check", lambda *_: None)
    return h100


def test_where_nothing_was_measured_the_counts_of_the_compiled_step_decide(counts):
    refusal = lambda op, compiled: dispatch.refusal(op, torch.bfloat16, 512, 0, compiled)
    assert refusal("rms_norm", True) == refusal("rms_norm", False) == refusal("rotary", False) == ""
    assert refusal("rotary", True) == (
        "counts of the compiled step: 1.000 of its streaming bytes, 1.000 of its memory, 1.000 of its FLOPs, "
        "with our kernels"
    )
    counts.setattr(tuned, "KEPT", dict(rotary="its reference spills"))
    dispatch.forget()
    assert refusal("rotary", True) == ""
    assert "no measurement" in refusal("mlp_relu2", True)  # bytes do not tell how fast a product is
    assert refusal("embedding", True) == ""  # not counted
    counts.setattr(tuned, "KEPT", {})
    counts.setattr(tuned, "architecture", lambda index: "sm_75")
    dispatch.forget()
    assert refusal("rotary", True) == ""  # nor is this kind of card


def test_counts_are_of_a_step_in_bfloat16(counts):
    """float16 has the same bytes; weights and moments are float32 there too."""
    counts.setitem(COUNTS["sm_90"], "adamw_", dict(streaming=1.1, peak=1.0, flops=1.0))
    refusal = lambda op, dtype: dispatch.refusal(op, dtype, 512, 0, True)
    assert "counts" in refusal("rotary", torch.bfloat16) and "counts" in refusal("rotary", torch.float16)
    assert refusal("rotary", torch.float32) == ""
    assert "counts" in refusal("adamw_", torch.float32)


@pytest.mark.parametrize("name", ["polar_express", "newton_schulz", "flash_attention"])
@pytest.mark.parametrize("compiled", [True, False])
def test_products_in_float32_are_pytorchs_until_they_were_measured(counts, name, compiled):
    """Ours are IEEE's, on the ordinary units; a float16 training orthogonalises in float32."""
    counts.setitem(COUNTS["sm_90"], name, dict(streaming=0.5, peak=0.5, flops=0.5))
    assert "no measurement" in dispatch.refusal(name, torch.float32, 128, 0, compiled)
    assert dispatch.refusal(name, torch.bfloat16, 128, 0, compiled) == ""
    measured.adopt({name: [dict(dtype="float32", config={}, ms=1.0, reference_ms=2.0)]})
    dispatch.forget()
    try:
        assert dispatch.refusal(name, torch.float32, 128, 0, compiled) == ""
    finally:
        measured.adopt({})


def test_a_measurement_overrules_the_counts(counts):
    row = lambda ms, reference: [dict(dtype="*", config={}, ms=ms, reference_ms=reference)]
    measured.adopt(dict(rotary=row(1.0, 2.0), rms_norm=row(2.0, 1.0)))
    try:
        assert dispatch.refusal("rotary", torch.bfloat16, 64, 0, True) == ""
        assert "2 ms, 1 by torch.compile" in dispatch.refusal("rms_norm", torch.bfloat16, 64, 0, True)
    finally:
        measured.adopt({})


def test_the_table_says_which_rule_decided(counts):
    counts.setattr(dispatch, "_modes", {"*": "auto"})
    counts.setattr(torch.cuda, "is_available", lambda: True)
    counts.setattr(torch.cuda, "current_device", lambda: 0)
    measured.adopt(dict(cross_entropy=[dict(dtype="*", config={}, ms=1.0, reference_ms=2.0)]))
    try:
        rows = {name: (runs, why) for name, runs, why in dispatch.describe()}
    finally:
        measured.adopt({})
    assert rows["rms_norm"][0] == "triton" and "counts of the compiled step: 1.010 of" in rows["rms_norm"][1]
    assert rows["rotary"][0] == "torch" and rows["rotary"][1].endswith("; uncompiled calls run Triton")
    assert rows["mlp_relu2"][0] == "torch" and not rows["mlp_relu2"][1].endswith("Triton")
    assert rows["cross_entropy"][1].startswith("measured on this kind of card: 1 ms, 2 by torch.compile")
    assert rows["embedding"] == (
        "triton", "default: our kernels where nothing else is known; the probe launches gave the right answers"
    )  # fmt: skip


# ---- without Triton, and beside Hugging Face's package of the same name


def test_everything_imports_and_runs_without_triton(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('none here')\n")
    code = (
        "import torch, kernels, kernels.targets\n"
        "from kernels import triton_utils\n"
        "assert not triton_utils.INSTALLED\n"
        "print(kernels.rms_norm(torch.ones(2, 4)).sum().item())\n"
    )
    made = run("-c", code, path=[tmp_path])
    assert made.stdout == "8.0\n", made.stderr


def test_names_that_nobody_has_are_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'kernels' has no attribute 'softmax'"):
        kernels.softmax  # noqa: B018


def test_the_other_package_is_found_behind_ours(tmp_path):
    """A stand-in for Hugging Face's distribution: names, submodules, imports of its own."""
    (tmp_path / "kernels-9.dist-info").mkdir()
    (tmp_path / "kernels-9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 9\n")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("from kernels.layer import Mode\nget_kernel = len\n")
    (tmp_path / "kernels" / "layer.py").write_text("class Mode: pass\n")
    code = (
        "import kernels\nfrom kernels import Mode, get_kernel, rms_norm\nimport kernels.layer\n"
        "assert kernels.layer.Mode is Mode\nprint(get_kernel('abc'), rms_norm.__module__)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert made.stdout == "3 kernels.rms_norm\n", made.stderr


@pytest.mark.slow
def test_transformers_works_beside_ours_with_the_other_package_installed():
    import importlib.metadata

    for name in ("transformers", "kernels"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed (pip install transformers kernels)")
    made = run("-c", "import kernels; from transformers import LlamaForCausalLM; print(kernels.OPS['rms_norm'].name)")
    assert made.stdout == "rms_norm\n", made.stderr[-2000:]


def test_a_full_card_is_no_kernels_fault(monkeypatch):
    """Its memory is emptied and the probe made again; and if that fails too, the next call asks again."""
    tries, emptied = [], []

    def check(*args):
        tries.append(args)
        if len(tries) <= full:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(dispatch, "_DECIDED", {})
    monkeypatch.setattr(dispatch, "_TRIED", {})
    monkeypatch.setattr(dispatch, "unfit", lambda *key: "")
    monkeypatch.setattr(tuned, "verdict", lambda *call: (True, ""))
    monkeypatch.setattr(dispatch.probing, "check", check)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    full = 1
    assert dispatch.refusal("rms_norm", torch.bfloat16, 8, 0) == "" and len(tries) == 2 and emptied == [1]
    full = 4
    dispatch.forget()
    with pytest.warns(UserWarning, match="OutOfMemoryError"):
        assert dispatch.refusal("rms_norm", torch.bfloat16, 8, 0).startswith("OutOfMemoryError")
    assert dispatch.refusal("rms_norm", torch.bfloat16, 8, 0) == "" and len(tries) == 5
