"""The recipe of one dial: from the depth follow width, training horizon, batch size, learning rates and schedules.

Depth d means width 64·d. The horizon is a fixed ratio of tokens to parameters; the best batch size grows with the
horizon as D^0.383 (Bergsma et al., Power Lines, arXiv:2505.13738), learning rates with √batch, and the weight decay so
that the time scale batch/(lr·decay·tokens) stays the same (Wang & Aitchison, arXiv:2405.13698). All constants were
tuned by nanochat at depth 12.
"""

import math
from dataclasses import dataclass

from nanochat.cost import flops_per_token, scaling_params
from nanochat.errors import UserError
from nanochat.gpt import GPTConfig

REFERENCE_DEPTH = 12
REFERENCE_BATCH = 2**19  # tokens, best at depth 12
RATES = dict(embedding_lr=0.3, unembedding_lr=0.008, matrix_lr=0.02, scalar_lr=0.5)  # learning rates at that batch
WEIGHT_DECAY = 0.28  # Muon's at that depth


def model_config(
    depth: int,
    vocab_size: int,
    max_seq_len: int = 2048,
    aspect_ratio: int = 64,
    head_dim: int = 128,
    window_pattern: str = "SSSL",
) -> GPTConfig:
    """Sizes for a depth: width depth·aspect_ratio, rounded up to whole heads. Raises UserError for impossible ones."""
    for name, value in (("depth", depth), ("aspect-ratio", aspect_ratio), ("head-dim", head_dim)):
        if value < 1:
            raise UserError(f"--{name} is {value}, wanted at least 1")
    heads = -(-depth * aspect_ratio // head_dim)
    try:
        return GPTConfig(
            sequence_len=max_seq_len,
            vocab_size=vocab_size,
            n_layer=depth,
            n_head=heads,
            n_kv_head=heads,
            n_embd=heads * head_dim,
            window_pattern=window_pattern.upper(),
        )
    except ValueError as error:
        raise UserError(str(error)) from None


@dataclass(frozen=True)
class Horizon:
    """How long to train and on what batches; lr_scale multiplies the learning rates given for the reference batch."""

    num_iterations: int
    total_batch_size: int  # tokens
    lr_scale: float
    weight_decay: float


def horizon(
    config: GPTConfig,
    weight_decay: float,
    ratio: float = 12.0,
    num_iterations: int = -1,
    target_flops: float = -1.0,
    total_batch_size: int = -1,
) -> Horizon:
    """Steps, batch and scaled hyperparameters. The first given of num_iterations, target_flops, ratio sets the length.

    ratio: tokens per scaling parameter, also where it does not set the length: batch and decay are made for it.
    """
    tokens = ratio * scaling_params(config)
    reference = ratio * scaling_params(model_config(REFERENCE_DEPTH, config.vocab_size, config.sequence_len))
    if total_batch_size <= 0:
        total_batch_size = 2 ** round(math.log2(REFERENCE_BATCH * (tokens / reference) ** 0.383))
    if num_iterations <= 0:
        if target_flops > 0:
            num_iterations = round(target_flops / (flops_per_token(config) * total_batch_size))
        elif ratio > 0:
            num_iterations = int(tokens) // total_batch_size
        if num_iterations <= 0:
            raise UserError("no training horizon: give --num-iterations, --target-flops or --target-param-data-ratio")
    scale = math.sqrt(total_batch_size / REFERENCE_BATCH)
    return Horizon(num_iterations, total_batch_size, scale, weight_decay * scale * reference / tokens)


@dataclass(frozen=True)
class Schedule:
    """Learning rate, Muon momentum and weight decay by step, as multipliers or values; all pure functions of the step.

    Warm-up and momentum ramp are 40 and 400 steps, but never more than a twentieth and a quarter of a short run.
    """

    num_iterations: int
    warmup_steps: int = 40
    warmdown_ratio: float = 0.65
    final_lr_frac: float = 0.05
    momentum_start: float = 0.85
    momentum_peak: float = 0.97
    momentum_end: float = 0.90

    def lr(self, step: int) -> float:
        """Multiplier of every group's initial learning rate."""
        warmup = min(self.warmup_steps, max(1, self.num_iterations // 20))
        warmdown = round(self.warmdown_ratio * self.num_iterations)
        left = self.num_iterations - step
        if step < warmup and self.warmup_steps > 0:
            return (step + 1) / warmup
        if left >= warmdown:
            return 1.0
        return self.final_lr_frac + (1 - self.final_lr_frac) * left / warmdown

    def momentum(self, step: int) -> float:
        """Muon's momentum: up in the beginning, down again during the warmdown."""
        ramp = min(400, max(1, self.num_iterations // 4))
        warmdown = round(self.warmdown_ratio * self.num_iterations)
        start = self.num_iterations - warmdown
        if step < ramp:
            return self.momentum_start + (self.momentum_peak - self.momentum_start) * step / ramp
        if step >= start and warmdown > 0:
            return self.momentum_peak + (self.momentum_end - self.momentum_peak) * (step - start) / warmdown
        return self.momentum_peak

    def weight_decay(self, step: int) -> float:
        """Multiplier of Muon's weight decay: a cosine from 1 to 0."""
        return 0.5 * (1 + math.cos(math.pi * step / max(1, self.num_iterations)))
