"""Calibration: rates out of times that a fake card takes, the file, who uses it, and what is said of a bad one."""

import json

import pytest
import standins
import tiny
import torch

from kernels import OPS
from nanochat.errors import UserError
from profiling.predicted import calibrate, cards
from profiling.predicted.cards import card

LAUNCH, STREAM, BF16, FP8, ATTENTION = 5e-6, 3e12, 700e12, 1200e12, 500e12
NAME = "NVIDIA H100 80GB HBM3"


def fake(what, sizes):
    """Seconds of a card whose rates are those above, whatever the size."""
    if what == "launch":
        return LAUNCH
    if what in calibrate.MOVED:
        return LAUNCH + calibrate.MOVED[what] * sizes[0] / STREAM
    if what == "attention":
        return LAUNCH + OPS["flash_attention"].flops(calibrate.ATTENTION) / ATTENTION
    M, N, K = sizes
    return LAUNCH + 2 * M * N * K / dict(bf16=BF16, fp8=FP8)[what]


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(cards, "FOLDER", tmp_path)
    return tmp_path


def test_rates_are_those_of_the_card():
    found, notes = calibrate.rates(fake, fp8=True)
    wanted = (LAUNCH, STREAM, BF16, FP8, ATTENTION)
    assert [found[key] for key in cards.RATES] == pytest.approx(wanted)
    assert {note["what"] for note in notes} == {"launch", "copy", "triad", "bf16", "fp8", "attention"}
    assert calibrate.rates(fake, fp8=False)[0]["fp8_flop_per_s"] is None


def test_attention_takes_fewer_rows_where_memory_is_small(folder):
    """On a T4 torch's own keeps the scores."""

    def small(what, sizes, most=4):
        if what == "attention" and sizes[0] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        flops = OPS["flash_attention"].flops(dict(zip(calibrate.ATTENTION, sizes))) if what == "attention" else 0
        return LAUNCH + flops / ATTENTION if what == "attention" else fake(what, sizes)

    assert calibrate.rates(small, fp8=False)[0]["attention_flop_per_s"] == pytest.approx(ATTENTION)
    with pytest.raises(UserError, match="does not fit in the memory that is free"):
        calibrate.calibrate(NAME, lambda what, sizes: small(what, sizes, 0), False, {}, folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_operands_are_in_the_dtype_of_training(dtype, monkeypatch):
    seen = []
    real = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, **how: seen.append(how["dtype"]) or real(*shape, **how))
    calibrate.call("bf16", (4, 8, 2), dtype, "cpu")()
    calibrate.call("copy", (64,), dtype, "cpu")()
    assert set(seen) == {dtype}


def test_a_t4_is_measured_in_float16(folder, monkeypatch, capsys):
    standins.gpus(monkeypatch, "T4")
    monkeypatch.delenv("NANOCHAT_DTYPE", raising=False)
    asked = []
    monkeypatch.setattr(calibrate, "on_gpu", lambda what, sizes, dtype: asked.append(dtype) or fake(what, sizes))
    assert tiny.call_module("profiling.predicted.calibrate") == 0
    assert set(asked) == {torch.float16}
    made = json.loads((folder / "tesla-t4.json").read_text())
    assert made["environment"]["dtype"] == "float16" and "written" in capsys.readouterr().out


def test_products_count_by_the_time_they_take():
    def slow_head(what, sizes):
        return fake(what, sizes) * (3 if what == "bf16" and sizes[1] == 32768 else 1)

    shapes = calibrate.PRODUCTS
    work = [2 * M * N * K for M, N, K in shapes]
    took = sum(slow_head("bf16", shape) - LAUNCH for shape in shapes)
    assert calibrate.rates(slow_head, fp8=False)[0]["bf16_flop_per_s"] == pytest.approx(sum(work) / took)


def test_the_file_replaces_the_fitted_constants_and_is_named(folder, capsys):
    before = card("H100")
    path = calibrate.calibrate(NAME, fake, True, dict(torch="x"), folder)
    assert path.name == "nvidia-h100-80gb-hbm3.json" and json.loads(path.read_text())["environment"] == dict(torch="x")
    chip = card("H100")
    assert not before.calibrated and chip.calibrated and "calibrated on 2" in chip.constants
    assert (chip.launch, chip.stream, chip.products(), chip.products(fp8=True)) == pytest.approx(
        (LAUNCH, STREAM, BF16, FP8)
    )
    assert chip.attention * chip.bf16 == pytest.approx(ATTENTION)
    assert card("H200") == card("H200") and not card("H200").calibrated  # not a look-alike
    assert tiny.call_module("profiling.predicted.simulate", "--depth=4", "--gpus=1") == 0
    text = capsys.readouterr().out
    assert "calibrated on" in text and json.loads(text.strip().split("\n")[-1])["calibrated"]
    assert tiny.call_module("profiling.predicted.points") == 0
    assert "H100 calibrated on" in capsys.readouterr().out


def test_a_card_without_fp8_keeps_what_it_had(folder):
    calibrate.calibrate("NVIDIA A100-SXM4-80GB", fake, False, {}, folder)
    assert card("A100").calibrated and card("A100").products(fp8=True) == 0


def test_a_time_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="no longer than an empty launch"):
        calibrate.rates(lambda what, sizes: LAUNCH, fp8=False)


def written_by_hand(**changed):
    rates = dict(launch_s=4e-6, stream_bytes_per_s=3e12, bf16_flop_per_s=7e14, fp8_flop_per_s=None,
                 attention_flop_per_s=5e14)  # fmt: skip
    return dict(version=cards.VERSION, gpu=NAME, date="2026-01-02", rates=rates) | changed


def test_a_file_written_by_hand(folder):
    (folder / f"{cards.slug(NAME)}.json").write_text(json.dumps(written_by_hand()))
    chip = card("H100")
    assert chip.calibrated == "2026-01-02" and chip.launch == 4e-6 and chip.gemm_fp8 == cards.GEMM_FP8


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        (json.dumps(written_by_hand(rates={})), "is damaged"),
        (json.dumps(written_by_hand(rates=dict(written_by_hand()["rates"], launch_s=-1))), "is damaged"),
        (json.dumps(written_by_hand(rates=dict(written_by_hand()["rates"], launch_s=float("nan")))), "is damaged"),
        *(
            (json.dumps(written_by_hand(rates=dict(written_by_hand()["rates"], stream_bytes_per_s=rate))), "is damaged")
            for rate in ("3e12", True, [3e12])
        ),
        (json.dumps(written_by_hand(date=None)), "is damaged"),
        (json.dumps(written_by_hand(version=0)), "is of version 0, wanted 1"),
    ],
)
def test_a_bad_file_is_one_sentence_that_names_it(folder, capsys, text, words):
    path = folder / f"{cards.slug(NAME)}.json"
    path.write_text(text)
    assert tiny.call_module("profiling.predicted.simulate") == 2
    said = capsys.readouterr().err
    assert str(path) in said and words in said and "profiling calibrate" in said and said.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, which would be measured")
def test_without_a_gpu_it_says_so(capsys):
    assert tiny.call_module("profiling.predicted.calibrate") == 2
    assert "torch sees no CUDA device here" in capsys.readouterr().err
