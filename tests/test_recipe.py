import math

import pytest
import torch

from nanochat import cost
from nanochat.errors import UserError
from nanochat.gpt import GPTConfig
from nanochat.recipe import Schedule, horizon, model_config


def test_the_dial():
    config = model_config(24, 32768)
    assert (config.n_embd, config.n_head, config.head_dim) == (1536, 12, 128)
    assert model_config(5, 32768).n_embd == 384  # 320 rounded up to whole heads of 128
    with pytest.raises(UserError, match="--depth is 0"):
        model_config(0, 32768)


def test_counts_by_hand():
    config = GPTConfig(sequence_len=64, vocab_size=100, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, window_pattern="L")
    counts = cost.parameter_counts(config)
    block = 32 * 32 * 2 + 32 * 16 * 2 + 2 * 4 * 32 * 32  # q and proj, k and v, the MLP
    assert counts["wte"] == counts["lm_head"] == 128 * 32
    assert counts["value_embeds"] == 128 * 16
    assert counts["transformer_matrices"] == 2 * block + 12 * 2
    assert counts["scalars"] == 2 + 2 + 24 + 1 + 1
    linears = counts["transformer_matrices"] + counts["lm_head"] + 24
    assert cost.flops_per_token(config) == 6 * linears + 2 * 12 * 4 * 8 * 64


def test_windows_cost_less():
    full, short = (model_config(12, 32768, window_pattern=pattern) for pattern in ("L", "SSSL"))
    saved = cost.flops_per_token(full) - cost.flops_per_token(short)
    assert saved == 9 * 12 * 768 * (2048 - 512)


def test_the_recipe_at_its_reference_is_itself():
    at12 = horizon(model_config(12, 32768), weight_decay=0.28)
    assert (at12.total_batch_size, at12.lr_scale) == (2**19, 1.0)
    assert at12.weight_decay == pytest.approx(0.28)
    assert at12.num_iterations == 12 * cost.scaling_params(model_config(12, 32768)) // 2**19


def test_the_recipe_at_depth_24():
    config = model_config(24, 32768)
    run = horizon(config, weight_decay=0.28, ratio=8)
    growth = cost.scaling_params(config) / cost.scaling_params(model_config(12, 32768))
    assert run.total_batch_size == 2 ** round(math.log2(2**19 * growth**0.383)) == 2**20
    assert run.lr_scale == math.sqrt(2)
    assert run.weight_decay == pytest.approx(0.28 * math.sqrt(2) / growth)


def test_horizons_given_otherwise():
    config = model_config(4, 4096)
    assert horizon(config, 0.0, num_iterations=7).num_iterations == 7
    flops = cost.flops_per_token(config) * 8192 * 5
    assert horizon(config, 0.0, target_flops=flops, total_batch_size=8192).num_iterations == 5
    with pytest.raises(UserError, match="no training horizon"):
        horizon(config, 0.0, ratio=1e-9, total_batch_size=8192)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 100, 5000])
def test_schedules_stay_within_bounds_and_end_where_they_should(steps):
    schedule = Schedule(steps)
    rates = [schedule.lr(step) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert all(0.84 < schedule.momentum(step) <= 0.97 for step in range(steps))
    if steps >= 100:
        assert max(rates) == 1.0 and rates[-1] == pytest.approx(0.05, abs=0.02)
        assert rates == sorted(rates[: rates.index(1.0)]) + rates[rates.index(1.0) :]
        assert schedule.momentum(0) == 0.85 and schedule.momentum(steps - 1) == pytest.approx(0.90, abs=0.003)
    assert schedule.weight_decay(0) == 1.0 and schedule.weight_decay(steps) == pytest.approx(0.0, abs=1e-12)


def test_warmup_is_forty_steps_unless_the_run_is_short():
    assert [Schedule(2000).lr(step) for step in (0, 19, 39, 40)] == [1 / 40, 0.5, 1.0, 1.0]
    assert Schedule(100).lr(4) == 1.0 > Schedule(100).lr(3)


def test_a_decode_step_by_hand():
    config = GPTConfig(
        sequence_len=512, vocab_size=256, n_layer=2, n_head=1, n_kv_head=1, n_embd=128, window_pattern="SL"
    )
    linears = sum(m.weight.numel() for m in cost.meta_model(config).modules() if isinstance(m, torch.nn.Linear))
    flops, moved = cost.decode_cost(config, [200, 200, 100], 2)
    seen = 2 * (129 + 200) + 2 * 100  # the window is of 128 keys before the token's own
    assert flops == 3 * 2 * linears + 4 * 128 * seen
    assert moved == 2 * linears + 2 * 2 * 128 * seen
