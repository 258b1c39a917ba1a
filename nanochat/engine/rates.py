"""How much of the machine decoding uses."""

from functools import cache

import torch

from nanochat import hardware
from nanochat.cost import decode_cost
from nanochat.gpt import GPTConfig

limits = cache(hardware.limits)  # on a CPU it measures them


def used(
    config: GPTConfig, keys: list[int], seconds: float, dtype: torch.dtype, machine: str, weight_bytes: int
) -> dict[str, float]:
    """Rates of a step that takes so long, keys of each row, and, where the limits are known, their shares.

    weight_bytes: of one weight of a matrix.
    """
    flops, moved = decode_cost(config, keys, dtype.itemsize, weight_bytes)
    rates = dict(gflop_per_s=flops / seconds / 1e9, gb_per_s=moved / seconds / 1e9)
    if found := limits(machine, dtype):
        most, bandwidth = found
        rates.update(flop_use=rates["gflop_per_s"] * 1e9 / most, bandwidth_use=rates["gb_per_s"] * 1e9 / bandwidth)
    return rates
