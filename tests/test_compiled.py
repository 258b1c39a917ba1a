"""A step compiled for an H100 that is not here: its launches, their bytes and FLOPs by hand, and the page about it."""

from dataclasses import asdict

import pytest
import test_memory
import tiny
import torch

from nanochat.cost import linear_params
from nanochat.recipe import model_config
from nanochat.render import page
from profiling.compiled import launches, lower, null_device, sections
from profiling.predicted.cards import card


def test_categories():
    for name, wanted in {
        "mm": launches.PRODUCTS,
        "linear_relu2: _product_kernel": launches.PRODUCTS,
        "flash_attention: _attention_fwd_kernel": launches.ATTENTION,
        "cross_entropy: _cross_entropy_kernel": launches.LOSS,
        "triton_poi_fused__to_copy_1": launches.COPIES,
        "triton_poi_fused_zeros_12": launches.COPIES,
        "triton_poi_fused__to_copy_add_3": launches.STREAMING,
        "triton_poi_fused_embedding_0": launches.STREAMING,
    }.items():
        assert launches.category(name) == wanted, name


def test_the_line_is_the_models_and_who_called_it():
    frame = '  File "/somewhere/nanochat/gpt.py", line {}, in forward\n    x\n'
    trace = frame.format(7) + frame.format(11) + '  File "/torch/nn/functional.py", line 3, in f\n'
    assert launches.innermost([trace, frame.format(5), trace]) == "gpt.py:7 › gpt.py:11"
    assert launches.innermost([]) == launches.innermost(["nothing"]) == ""


def test_flops_by_hand():
    a, b = torch.empty(6, 4, device="meta"), torch.empty(4, 5, device="meta")
    assert launches.product_flops([a, b]) == 2 * 6 * 4 * 5
    q = torch.empty(2, 8, 3, 16, device="meta")  # (B, T, H, D)
    pairs = sum(min(i + 1, 3) for i in range(8))
    assert launches.attention_flops("flash_attention", [q, q, q, 2]) == 4 * 2 * 3 * 16 * pairs
    assert launches.attention_flops("flash_attention_backward", [q, q, q]) == 10 * 2 * 3 * 16 * 36
    assert launches.attention_flops("rotary", [q, q]) == 0


def made(**changed):
    row = dict(phase="forward 2", who="inductor", name="triton_poi_fused_add_0", category="streaming", bytes=2 * 10**9,
               flops=0, fp8=False, line="gpt.py:1 › gpt.py:2", kernel="k", predicted_s=1e-3, usual=0.3, band=0.3,
               bound="memory", lower_bound=False)  # fmt: skip
    phase = dict(peak=2**30, kinds=dict(saved=2**30), blocks=[(2**30, 1, "saved", "buf0 = …")])
    kernel = dict(registers=40, access_bytes=16, spill_bytes=0, float64_instructions=0, error="")
    return dict(launches=[{**row, **changed}], kernels=dict(k=kernel), memory={"forward 2": phase}, curve=[1, 2**30])


def test_what_is_suspect():
    found = made()
    row, kernel = found["launches"][0], found["kernels"]["k"]
    assert sections.reasons(row, kernel) == []
    assert sections.reasons(row | dict(category=launches.COPIES), {}) == ["computes nothing"]
    bad = dict(kernel, access_bytes=2, spill_bytes=8, float64_instructions=1)
    assert sections.reasons(row, bad) == ["2 bytes at a time", "spills 8 bytes", "float64"]
    assert sections.reasons(row, dict(error="no")) == ["does not compile: no"]


def test_the_page_has_both_sides_and_says_what_is_predicted():
    two = made(category="matrix products", flops=10**12)
    text = page("x", sections.sections(dict(auto=made(), torch=two), card("H100")))
    assert "PREDICTED" in text and "auto: GB" in text and "torch: GB" in text and "gpt.py:1 › gpt.py:2" in text
    assert sections.totals(made())["streaming_gigabytes"] == 2 and sections.totals(two)["streaming_gigabytes"] == 0


def test_wrong_use_is_one_sentence(capsys, monkeypatch):
    for flags, said in (["--card=H300"], "H300"), (["--card=A100", "--fp8"], "has no fp8 units"):
        assert tiny.call_module("profiling.compiled.report", *flags) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setattr(null_device.shutil, "which", lambda name: None)
    assert tiny.call_module("profiling.compiled.report", "--depth=1") == 2
    assert "g++" in capsys.readouterr().err


@pytest.fixture(scope="module")
def small():
    """(the case, what a child finds of it): two layers, not compiled to machine code."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if reason := null_device.obstacle():
        pytest.skip(reason)
    case = lower.Case(asdict(model_config(2, 4096, 512)), rows=8, optimizer=False)
    return case, lower.ask("tests.null_device.small_step", case, "h100")


def test_the_lowered_step_of_a_small_model_allocates_what_is_predicted(small):
    test_memory.check(*small)


def test_launches_of_a_small_step(small):
    """Products have the FLOPs of the model, and each micro-batch the same launches; sources and lines are known."""
    case, found = small
    steps = [[row for row in found["launches"] if row["phase"].endswith(f" {i}")] for i in (1, 2)]
    assert [row["name"] for row in steps[0]] == [row["name"] for row in steps[1]] and len(steps[0]) > 50
    tokens = case.rows * case.config["sequence_len"]
    multiplied = sum(row["flops"] for row in steps[0] if row["category"] == launches.PRODUCTS)
    assert multiplied == pytest.approx(6 * tokens * linear_params(model_config(2, 4096, 512)), rel=0.01)
    known = {*found["generated"], *found["ours"]}
    assert all(row["kernel"] in known for row in steps[0] if row["who"] in (launches.INDUCTOR, launches.OURS))
    assert {row["who"] for row in steps[0]} >= {launches.INDUCTOR, launches.OURS, launches.LIBRARY}
    activations = tokens * case.config["n_embd"] * 2
    first = next(row for row in steps[0] if row["name"].startswith("rms_norm:"))
    assert first["bytes"] == 2 * activations and first["line"].startswith("gpt.py:")
    unknown = [row for row in steps[0] if not row["line"] and row["bytes"] > activations]
    assert len(unknown) < len(steps[0]) / 10, unknown
