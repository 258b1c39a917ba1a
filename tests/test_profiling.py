"""The simulator: parts by hand, published points within their bands, levers that save, one sentence for wrong use."""

import json
from dataclasses import replace

import pytest
import tiny

from nanochat.cost import parameter_counts
from nanochat.errors import UserError
from nanochat.gpt import GPTConfig
from nanochat.recipe import model_config
from profiling.__main__ import COMMANDS
from profiling.predicted import by_hand, cards, points, simulate
from profiling.predicted.cards import all_reduce, card
from profiling.predicted.counts import GLUE, NORMS, RELU2, VARIANTS
from profiling.predicted.simulate import Job


@pytest.fixture(autouse=True)
def no_calibration(monkeypatch, tmp_path):
    """What is tested are the fitted constants, whatever was measured on this machine's card."""
    monkeypatch.setattr(cards, "FOLDER", tmp_path)


@pytest.mark.parametrize("point", points.POINTS, ids=lambda p: f"{p.hardware} {p.what}")
def test_published_points_are_within_their_bands(point):
    if point.exception:
        assert abs(point.error) > point.band, "it is no exception any more"
    else:
        assert abs(point.error) <= point.band


def test_most_points_were_not_fitted_on():
    assert sum(p.fitted for p in points.POINTS) <= 9 < sum(not p.fitted and not p.exception for p in points.POINTS)


def test_attended_pairs_by_hand():
    config = GPTConfig(
        sequence_len=512, vocab_size=256, n_layer=2, n_head=1, n_kv_head=1, n_embd=128, window_pattern="SL"
    )
    full, short = sum(range(1, 513)) / 512, sum(min(t, 129) for t in range(1, 513)) / 512
    assert simulate.attended(config) == pytest.approx(full + short)
    assert simulate.attended(config, short=512) == pytest.approx(2 * full)


def test_products_by_hand():
    job = Job(model_config(12, 32768), card("H100"), gpus=1, total=65536)
    weights = 12 * 12 * 768**2 + 768 * 32768
    took = simulate.step(job)["products"]
    assert took == pytest.approx(6 * weights * 65536 / (0.94 * 794.5e12), rel=1e-3)  # gates are the rest


def test_more_gpus_more_speed_and_only_they_communicate():
    one = Job(model_config(12, 32768), card("H100"), gpus=1)
    eight = replace(one, gpus=8)
    assert "communication, exposed" not in simulate.step(one) and "communication, exposed" in simulate.step(eight)
    assert 5 < simulate.seconds(one) / simulate.seconds(eight) < 8


def test_small_messages_pay_for_their_start_and_large_ones_for_their_bytes():
    chip = card("H200")
    assert all_reduce(chip, 1, 8) == pytest.approx(cards.START, rel=1e-3)
    assert all_reduce(chip, 1 << 40, 8) == pytest.approx(1.75 * (1 << 40) / (cards.BUS * 900e9), rel=0.01)
    assert all_reduce(chip, 1 << 24, 2) < all_reduce(chip, 1 << 24, 8) < 2 * all_reduce(chip, 1 << 24, 4)


def test_every_gradient_travels_once():
    config = model_config(12, 32768)
    counts = parameter_counts(config)
    wanted = 4 * (counts["transformer_matrices"] + counts["lm_head"]) + 2 * (counts["wte"] + counts["value_embeds"])
    assert sum(simulate.messages(config)) == pytest.approx(wanted, rel=1e-3)  # a few scalars travel too


@pytest.mark.parametrize(
    "depth, gpus, batch, pattern", [(1, 1, 1, "L"), (8, 2, 4, "SL"), (26, 4, 8, "SSSL"), (32, 8, 4, "L")]
)
def test_any_job_has_an_answer(depth, gpus, batch, pattern):
    config = model_config(depth, 32768, window_pattern=pattern)
    for variant in VARIANTS:
        job = Job(config, card("H100"), gpus, batch, variant=variant)
        parts = simulate.step(job)
        assert all(part >= 0 for part in parts.values()) and 0.1 < simulate.mfu(job, sum(parts.values())) < 1
        more = replace(job, total=2 * job.total)  # twice the accumulation: less than twice the time
        assert 1.7 < simulate.seconds(more) / simulate.seconds(job) < 2


@pytest.mark.parametrize("variant", ["plain", "fp8 loop"])
def test_each_group_of_ops_saves(variant):
    job = Job(model_config(24, 32768), card("H100"), variant=variant)
    took = {other.variant: simulate.seconds(other) for _, other in simulate.what_if(job)}
    assert all(took[name] < took[before] for name in took if (before := simulate.STEPS[name][1])) and len(took) > 2


def test_what_was_counted_by_hand_is_beside(capsys):
    """The activations' parts within a third; what is further off is explained."""
    for variant in ("plain", "ours", "fp8 loop", "fp8 ours"):
        job = Job(model_config(24, 32768), card("H100"), variant=variant)
        rows = by_hand.compared(variant, job.config, job.tokens, job.micro, simulate.moved(job))
        for name, size, hand, why in rows:
            near = hand is None or abs(size / hand - 1) < 0.33
            assert near or (why and name not in (NORMS, RELU2, GLUE)), (variant, name)


def test_the_command(capsys):
    module = tiny.call_module("profiling.predicted.simulate", "--depth=4", "--card=RTX 4090", "--gpus=1", "--fp8")
    assert module == 0
    text = capsys.readouterr().out
    assert text.startswith("PREDICTED")
    said = json.loads(text.strip().split("\n")[-1])
    assert said["predicted"] and sum(said["parts_s"].values()) == pytest.approx(said["step_s"])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--card=H300"], "is not known; there are A100"),
        (["--gpus=9"], "wanted 1 to 8"),
        (["--card=A100", "--fp8"], "has no fp8 units"),
        (["--variant=magic"], "there is no 'magic'"),
        (["--fp8", "--variant=plain"], "there is no 'fp8 plain'"),
        (["--total-batch-size=1000"], "no multiple of"),
        (["--depth=0"], "--depth is 0"),
        (["--device-batch-size=32"], "GiB, and a H100 has 79; take fewer rows"),
        (["--card=RTX 4070", "--gpus=1"], "is predicted to need"),
    ],
)
def test_wrong_use_is_one_sentence(capsys, flags, words):
    assert tiny.call_module("profiling.predicted.simulate", *flags) == 2
    assert words in capsys.readouterr().err


def test_an_unknown_card_is_no_look_alike():
    with pytest.raises(UserError, match="L40' is not known"):
        card("L40")


@pytest.mark.parametrize("name", [*COMMANDS.values(), "benchmarks.static_peers", "benchmarks.test_attention"])
def test_no_command_works_when_it_is_asked_for_help_or_for_what_it_has_not(name, capsys):
    assert tiny.call_module(name, "--help") == 0 and "usage:" in capsys.readouterr().out
    assert tiny.call_module(name, "--nonsense") == 2 and "error: " in capsys.readouterr().err
