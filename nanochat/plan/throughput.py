"""How fast base training will be here: predicted from a known GPU's peak, or measured with a few real steps."""

import time
from dataclasses import replace

import torch

from nanochat import hardware
from nanochat.cost import flops_per_token
from nanochat.gpt import GPT, GPTConfig
from nanochat.interrupt import Interrupt
from nanochat.plan.room import checkpoints, need_room
from nanochat.presets import Preset
from nanochat.run import Run

ASSUMED_MFU = 0.4  # on a GPU that nothing has been measured on
MEASURED_LAYERS = 2  # of a large model on a GPU whose peak is not known


def speed(machine: hardware.Hardware, config: GPTConfig, preset: Preset, gpus: int, run: Run) -> tuple[float, bool]:
    """(tokens per second of base training, whether it was measured).

    Predicted from a GPU's peak where that is known in this dtype. Measured otherwise: the small preset's model itself,
    or a model of the same width with few layers, whose FLOP/s the whole one is then expected to reach. Raises UserError
    before that when the disk cannot hold the run's checkpoints.
    """
    small = preset.name == "small"
    if machine.device.type == "cuda" and not small and machine.peak:
        return gpus * machine.peak.bf16 * 1e12 * ASSUMED_MFU / flops_per_token(config), False
    need_room(run, checkpoints(config))
    print("measuring this machine's speed with a few training steps …", flush=True)
    rows = int(preset.base["device_batch_size"])
    tried = config if small else replace(config, n_layer=MEASURED_LAYERS)
    with Interrupt():
        seconds = step_seconds(machine, tried, rows)
    return gpus * rows * config.sequence_len / seconds * flops_per_token(tried) / flops_per_token(config), True


def step_seconds(machine: hardware.Hardware, config: GPTConfig, rows: int) -> float:
    """Seconds of a training step of one micro-batch: the median of five, after one that compiles."""
    model = GPT(config).to(machine.device)
    model.init_weights(machine.dtype)
    optimizer = model.setup_optimizer()
    step = torch.compile(model, dynamic=False) if hardware.can_compile(machine.device)[0] else model
    ids = torch.randint(config.vocab_size, (rows, config.sequence_len), device=machine.device)
    marker = hardware.mark_compiling(hardware.compile_cache())
    times = []
    for _ in range(6):
        started = time.perf_counter()
        (step(ids, ids, loss_reduction="sum") / ids.numel()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        machine.synchronize()
        times.append(time.perf_counter() - started)
    marker.release()
    return sorted(times[1:])[2]
