"""Reference paths of the ablations: what stands in for a trick of the model or of the optimizer while a cell runs.

The model's and the optimizer's own files stay as they are: one name of theirs is replaced, for the time of a training.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import linear_cross_entropy, newton_schulz, rotary
from kernels.optim import muon_update_
from nanochat import gpt, optim
from scripts import base_train

WHOLE = "all tricks"  # the baseline
# How a trick is taken off: fields of the config, flags of base_train, or (module, name, what stands in).
FIELDS: dict[str, dict[str, Any]] = {
    "QK scale": dict(qk_scale=1.0),
    "value embeddings": dict(value_embeds=False),
    "smear": dict(smear=False),
    "backout": dict(backout=False),
    "residual mixing": dict(residual_mix=False),
    "all four tricks of the config": dict(value_embeds=False, smear=False, backout=False, residual_mix=False),
}
FLAGS: dict[str, dict[str, Any]] = {"windows": dict(window_pattern="L"), "weight decay": dict(weight_decay=0.0)}


def rotary_only(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q, k (B, T, H, D) as projected: no norm, no scale."""
    return rotary(q, cos, sin), rotary(k, cos, sin)


def mlp_gelu(x: Tensor, w1: Tensor, w2: Tensor, gradients: Sequence[Tensor] = ()) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1)), w2)


def mlp_relu(x: Tensor, w1: Tensor, w2: Tensor, gradients: Sequence[Tensor] = ()) -> Tensor:
    return F.linear(F.relu(F.linear(x, w1)), w2)


def uncapped(x: Tensor, weight: Tensor, targets: Tensor, softcap: float, **more: Any) -> Tensor:
    return linear_cross_entropy(x, weight, targets, None, **more)


def momentum_only_(
    grad: Tensor, buffer: Tensor, momentum: Any, dtype: torch.dtype, skip: Tensor | None = None
) -> Tensor:
    """Nesterov's momentum; rows keep their norms. (K, m, n). On a CPU no bad step gets here: skip is not used."""
    buffer.lerp_(grad, 1 - momentum)
    return grad.lerp(buffer, momentum).to(dtype)


def decay_all_(
    param: Tensor, update: Tensor, second: Tensor, lr: Any, decay: Any, beta2: Any, skip: Tensor | None = None
) -> None:
    """Weight decay also where it points against the update."""
    param.mul_(1 - lr * decay)
    muon_update_(param, update, second, lr, 0.0, beta2, skip)


def without_variance_(
    param: Tensor, update: Tensor, second: Tensor, lr: Any, decay: Any, beta2: Any, skip: Tensor | None = None
) -> None:
    """Muon without NorMuon's scale by row: the update only gets an orthogonal matrix's norm."""
    norm = update.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10)
    x = update * (min(param.shape[-2:]) ** 0.5 / norm)
    param.sub_(lr * (x + decay * param * (x * param >= 0)))


PATHS: dict[str, tuple[Any, str, Any]] = {
    "QK norm": (gpt, "qk_norm_rotary", rotary_only),
    "relu² (gelu instead)": (gpt, "mlp_relu2", mlp_gelu),
    "relu² (relu instead)": (gpt, "mlp_relu2", mlp_relu),
    "softcap": (gpt, "linear_cross_entropy", uncapped),
    "Polar Express (quintic instead)": (optim, "polar_express", newton_schulz),
    "row equilibration": (optim, "muon_momentum_", momentum_only_),
    "NorMuon's variance": (optim, "muon_update_", without_variance_),
    "cautious decay": (optim, "muon_update_", decay_all_),
}
ADAMW_RATES = (0.003, 0.01, 0.03)  # AdamW has had no tuning: the best of these is taken, which favours it
ADAMW = {f"Muon (AdamW, {rate:g})": rate for rate in ADAMW_RATES}
TRICKS = (*FIELDS, *FLAGS, *PATHS, *ADAMW)


@contextlib.contextmanager
def without(trick: str) -> Iterator[dict[str, Any]]:
    """Within it a training lacks the trick; gives flags of base_train that belong to it."""
    with contextlib.ExitStack() as stack:
        if trick in FIELDS:
            usual = base_train.model_config
            less = lambda *args, **kw: dataclasses.replace(usual(*args, **kw), **FIELDS[trick])
            stack.enter_context(mock.patch.object(base_train, "model_config", less))
        elif trick in PATHS:
            stack.enter_context(mock.patch.object(*PATHS[trick]))
        elif trick in ADAMW:
            usual_groups = optim.parameter_groups
            adamw = lambda *args, **kw: [_as_adamw(group, ADAMW[trick]) for group in usual_groups(*args, **kw)]
            stack.enter_context(mock.patch.object(optim, "parameter_groups", adamw))
        yield FLAGS.get(trick, {})


def _as_adamw(group: dict[str, Any], rate: float) -> dict[str, Any]:
    """A Muon group's matrices with AdamW's moments, at a rate of their own; the same decay times rate as Muon had."""
    if group["kind"] != "muon":
        return group
    decay = group["weight_decay"] * group["lr"] / rate
    own = dict(lr=rate, weight_decay=decay, initial_lr=rate, initial_weight_decay=decay)
    return dict(kind="adamw", params=group["params"], betas=(0.9, 0.95), eps=1e-10, **own)
