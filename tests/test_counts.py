"""Counts of compiled steps: between what was lowered nothing is lost, beyond it parts grow as they should."""

import json
from dataclasses import replace

import pytest
import tiny

from nanochat.errors import UserError
from nanochat.recipe import model_config
from profiling.compiled import ablate, count, fixes, null_device
from profiling.compiled.launches import Launch
from profiling.predicted import counts
from profiling.predicted.counts import LATER, LAYERS, ROWS, UPDATE, VARIANTS, T, counted

CONFIG, TOKENS = model_config(counts.DEPTH, counts.VOCABULARY, T), ROWS * T


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_was_lowered_is_met_exactly(variant):
    for layers in LAYERS:
        found = counted(variant, replace(CONFIG, n_layer=layers), TOKENS)
        for phase, cells in counts.lowered(variant, layers).items():
            for name, cell in cells.items():
                assert found[phase][name] == pytest.approx(cell), (phase, name)


@pytest.fixture
def small(monkeypatch):
    """Two layers move 10 bytes each of activations and 4 of weights; 6 and 2 more are moved whatever the layers."""
    sums = lambda layers: {
        LATER: {"relu²": [layers, 10.0 * layers + 6, 0.0], counts.PRODUCTS: [layers, 0.0, 3.0 * layers + 5]},
        UPDATE: {counts.OPTIMIZER: [1.0, 4.0 * layers + 2, 0.0], counts.ORTHOGONAL: [1.0, 0.0, 7.0 * layers]},
    }  # fmt: skip
    steps = {counts.key("plain", layers): dict(sums=sums(layers)) for layers in LAYERS}
    monkeypatch.setattr(counts, "table", lambda: dict(steps=steps))


def test_attention_grows_by_the_pairs_of_its_windows():
    """24 layers have six without a window; what was lowered has one."""
    full, short = 2049 / 2, (513 * 514 / 2 + (2048 - 513) * 513) / 2048  # keys of a query, on average
    for layers, pairs in ((2, full + short), (4, full + 3 * short), (24, 6 * full + 18 * short)):
        config = replace(model_config(12, counts.VOCABULARY, T), n_layer=layers)
        flops = counted("ours", config, TOKENS // 2)[LATER][counts.ATTENTION][2]
        assert flops == pytest.approx(14 * 768 * pairs * TOKENS / 2, rel=2e-3)


def test_parts_grow_by_hand(small):
    def numbers(depth, layers, tokens):
        found = counted("plain", replace(model_config(depth, counts.VOCABULARY, T), n_layer=layers), tokens)
        return (
            found[LATER]["relu²"][1], found[LATER][counts.PRODUCTS][2],
            found[UPDATE][counts.OPTIMIZER][1], found[UPDATE][counts.ORTHOGONAL][2],
        )  # fmt: skip

    assert numbers(24, 10, TOKENS) == pytest.approx((106, 35, 42, 70))
    assert numbers(24, 10, TOKENS // 2) == pytest.approx((53, 17.5, 42, 70))
    # Of 10 layers 5 have a table: 12 width² · 64 bytes a layer, one head of 28 and six tables of 12 by 32,768 words.
    matrices, rest = 10 * 12 * 1536**2 * 64, 32768 * 1536 * (28 + 6 * 12)
    share = (matrices / 4 + rest / 2) / (matrices + rest)
    assert numbers(12, 10, TOKENS) == pytest.approx((53, 30 / 4 + 5 / 2, 42 * share, 70 / 8), rel=1e-3)


def test_every_launch_has_a_part():
    def of(name, category="streaming", phase="forward 2", fp8=False):
        known = dict(phase=phase, name=name, category=category, fp8=fp8)
        return count.part(Launch(**{field: known.get(field, "") for field in Launch.__dataclass_fields__}))

    assert of("mm", "matrix products") == counts.PRODUCTS and of("mm", "matrix products", fp8=True) == "fp8 products"
    assert of("mm", "matrix products", "optimizer") == counts.ORTHOGONAL and of("x", phase="optimizer") == "optimizer"
    assert of("triton_poi_fused_mul_sqrt_view_4") == of("triton_poi_fused_pow_relu_3") == counts.RELU2
    assert of("triton_red_fused_mean_rsqrt_1") == of("mix_rms_norm: _rms_norm_fwd_kernel") == counts.NORMS
    assert of("triton_poi_fused__to_copy_1", "casts, copies, fills") == of("add_") == counts.SUMS
    assert of("embedding_backward: _embedding_bwd_kernel") == counts.TABLES
    assert of("fp8_add_rms_norm: _kernel") == counts.GLUE and of("triton_poi_fused_tanh_0") == "loss"


def test_what_is_missing_is_one_sentence(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="vocabulary of 32768"):
        counted("plain", model_config(2, 4096), TOKENS)
    monkeypatch.setattr(counts, "FILE", tmp_path / "counts.json")
    counts.table.cache_clear()
    for text in "{", '{"steps": 1, "code": {}}', '{"steps": {}, "code": {}}':
        counts.FILE.write_text(text)
        with pytest.raises(UserError, match=r"python -m profiling counts"):
            counted("plain", CONFIG, TOKENS)
    counts.table.cache_clear()


def test_all_steps_are_of_one_code_whatever_is_said_about_it(tmp_path):
    assert len({counts.table()["code"][name] for name in count.wanted()}) == 1, "python -m profiling counts"
    made = []
    for text in (
        'def f(x):\n    return x + "a"\n',
        '"""A module."""\n\n\ndef f(x):\n    """Says\n    more."""\n    # why\n    return x + "a"\n',
        'def f(x):\n    return x + "b"\n',
    ):
        (tmp_path / "f.py").write_text(text)
        made.append(count.bare(tmp_path / "f.py"))
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize("variant, program", [("ours", "step"), ("fp8 ours", "fp8")])
def test_a_step_has_the_same_counts_wherever_they_are_kept(variant, program):
    """What all predictions are made from, what decides about kernels, and what the fixes are set against."""
    cells = counts.lowered(variant, ablate.LAYERS)[LATER]
    streamed = sum(
        cell[1] for name, cell in cells.items() if name not in (counts.PRODUCTS, counts.FP8_PRODUCTS, counts.ATTENTION)
    )
    together = dict(launches=sum(cell[0] for cell in cells.values()), streaming=streamed)
    for file in [ablate.FILE] + [fixes.FILE] * (program == "step"):
        found = json.loads(file.read_text())
        sums = found["h100"][program][""] if file == ablate.FILE else found[""]
        assert {what: sums[what] for what in together} == together, file.name


def test_a_variant_that_is_not_there_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(count, "write_atomically", lambda *_: pytest.fail("written"))
    for word in ("typo", "ours,typo", ","):
        assert tiny.call_module("profiling.compiled.count", f"--only={word}") == 2
        said = capsys.readouterr().err
        assert "--only names" in said and "fp8 loop" in said and said.count("\n") == 1


@pytest.mark.slow
def test_all_steps_are_of_the_code_as_it_is_now():
    assert set(counts.table()["code"].values()) == {count.code()}, "python -m profiling counts"


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["plain", "ours", "fp8 ours"])
def test_the_code_as_it_is_now_has_these_counts(variant):
    """And twelve layers of another width have what is said of them."""
    if reason := null_device.obstacle():
        pytest.skip(reason)
    made = count.lowered(*VARIANTS[variant], LAYERS[0])
    assert made["sums"] == counts.lowered(variant, LAYERS[0])
    whole = count.lowered(*VARIANTS[variant], 12, depth=12)["sums"]
    found = counted(variant, model_config(12, counts.VOCABULARY, T), TOKENS)
    for phase in (LATER, UPDATE):
        for which in (1, 2):
            together = [sum(cell[which] for cell in sums[phase].values()) for sums in (found, whole)]
            assert together[0] == pytest.approx(together[1], rel=0.05), (phase, which)
