"""Every size of card has a preset that is predicted to fit it."""

import pytest

from nanochat import cost, presets
from nanochat.errors import UserError
from nanochat.presets import SIZES, SPREAD
from nanochat.recipe import horizon, model_config

REPORTED = dict(  # GiB that cards report as torch's total_memory
    MI300X=191.5, B200=178.4, H200=139.8, H100=79.1, A100_80=79.3, L40S=44.4, A100_40=39.5, RTX5090=31.4, RTX4090=23.5,
    L4=22.0, sixteen=15.6, T4=14.6, twelve=11.6, eight=7.6,
)  # fmt: skip


def share(preset, memory, gpus):
    """Of a GPU's memory, as predicted."""
    config = model_config(preset.base["depth"], preset.tokenizer["vocab_size"])
    return cost.training_bytes(config, preset.base["device_batch_size"] * 2048, gpus) / 2**30 / memory


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size.memory:g}")
def test_every_size_fits_into_nine_tenths(size, gpus):
    memory = SPREAD * size.memory
    preset = presets.gpu(memory, gpus, None)
    depth, rows = size.eight if gpus == 8 else (size.depth, size.rows)
    assert (preset.base["depth"], preset.base["device_batch_size"]) == (depth, rows)
    assert preset.name == f"{size.memory:g} GiB" and share(preset, memory, gpus) < 0.9
    batch = horizon(model_config(depth, 32768), 0.28, 8).total_batch_size
    assert batch % (rows * 2048 * gpus) == 0  # gradient accumulation fills the rest


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 12])
@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_a_smaller_models_step_can_be_shared_out(depth, gpus):
    """Eight H200 with 32 rows each would take a step of depth 8 twice."""
    batch = horizon(model_config(depth, 32768), 0.28, 8).total_batch_size
    for size in SIZES:
        preset = presets.gpu(size.memory, gpus, depth)
        assert batch % (preset.base["device_batch_size"] * 2048 * gpus) == 0, size


def test_every_card_has_its_row_and_forty_gib_eight_times_run_the_speedrun():
    assert [size.memory for size in SIZES] == sorted((size.memory for size in SIZES), reverse=True)
    names = {name: presets.gpu(memory, 1, None).name for name, memory in REPORTED.items()}
    assert all(float(names[name].split()[0]) > 0.95 * memory for name, memory in REPORTED.items())
    assert len(set(names.values())) == len(SIZES) and names["H100"] == names["A100_80"]
    for memory in REPORTED.values():
        assert presets.gpu(memory, 8, None).base["depth"] == 24 or memory < 39


def test_in_float16_fewer_rows_fit():
    """It keeps h beside relu², and there are no kernels of ours on cards without bfloat16."""
    for size in SIZES:
        preset = presets.gpu(size.memory, 1, None, "float16")
        config = model_config(preset.base["depth"], 32768)
        assert presets.predicted(config, preset.base["device_batch_size"], 1, "float16") < 0.9 * size.memory
    assert presets.gpu(31.7, 1, None, "float16").base["device_batch_size"] == 8  # a V100-32


def test_too_small_a_gpu_is_refused():
    with pytest.raises(UserError, match="6.0 GiB"):
        presets.gpu(6.0, 1, None)


@pytest.mark.parametrize(
    "memory, gpus, depth", [(79.1, 1, 21), (79.1, 1, 26), (79.1, 8, 32), (23.5, 1, 20), (14.6, 1, 16)]
)
def test_a_deeper_model_takes_fewer_rows(memory, gpus, depth):
    preset = presets.gpu(memory, gpus, depth)
    assert preset.base["depth"] == depth and share(preset, memory, gpus) < 0.9
    assert preset.base["device_batch_size"] <= presets.gpu(memory, gpus, None).base["device_batch_size"]


def test_a_depth_that_cannot_fit_is_refused_before_anything_begins():
    with pytest.raises(UserError, match="--depth 32 needs .* GiB a GPU for a single row, as predicted, of 14.6"):
        presets.gpu(14.6, 1, 32)


def test_the_prediction_decides_the_rows(monkeypatch):
    monkeypatch.setattr(presets, "predicted", lambda config, rows, *_: rows * 10)
    assert presets.gpu(79.1, 1, 24).base["device_batch_size"] == 4  # not 8, which would take 80 GiB
