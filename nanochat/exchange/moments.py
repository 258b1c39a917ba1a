"""The optimizer's moments, between ours ("group.parameter.name" → tensor) and nanochat's optim_*.pt.

Today's code has the groups of ours in our order; each rank has saved its share. October 2025 had an AdamW and a Muon,
whose momentum means the same; Muon's second moments did not exist then and begin at zero here.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.optim import second_moment_shape
from nanochat.cost import meta_model
from nanochat.exchange import layout
from nanochat.gpt import GPTConfig
from nanochat.optim import is_muon, parameter_groups

SHARED = 1024  # elements from which nanochat's AdamW divides a parameter's state among ranks
Flat = dict[str, Tensor]


class Unfit(Exception):
    """Why a saved state cannot be gone on with."""


def to_upstream(flat: Flat, config: GPTConfig, rates: dict[str, float]) -> dict[str, Any]:
    """What today's nanochat saves on one rank."""
    groups, state, saved, at = parameter_groups(meta_model(config), **rates), {}, [], 0
    for g, group in enumerate(groups):
        numbers = list(range(at, at + len(group["params"])))
        at += len(numbers)
        for i, number in enumerate(numbers):
            own = {key.split(".")[2]: value for key, value in flat.items() if key.startswith(f"{g}.{i}.")}
            if "step" in own:
                own["step"] = int(own["step"])  # type: ignore[assignment]
            if "second_moment" in own:
                own["second_momentum_buffer"] = own.pop("second_moment")
            if own:
                state[number] = own
        settings = {
            key: value for key, value in group.items() if key not in ("params", "steps", "initial_weight_decay")
        }
        saved.append(dict(settings, params=numbers, **(dict(ns_steps=group["steps"]) if is_muon(group) else {})))
    return dict(state=state, param_groups=saved)


def from_upstream(ranks: list[Any], config: GPTConfig) -> Flat:
    """Ours from what each rank saved. Raises Unfit."""
    try:
        found = _october(ranks, config) if layout.is_original(config) else _today(ranks, config)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as problem:
        raise Unfit(f"it has another form ({type(problem).__name__}: {problem})") from None
    return found


def _today(ranks: list[dict[str, Any]], config: GPTConfig) -> Flat:
    groups, flat = parameter_groups(meta_model(config)), {}
    numbers = [group["params"] for group in ranks[0]["param_groups"]]
    if [len(one) for one in numbers] != [len(group["params"]) for group in groups]:
        raise Unfit("its groups of parameters are others")
    for g, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            shares = [rank["state"].get(numbers[g][i]) for rank in ranks]
            if is_muon(group) and i > 0:
                continue
            if any(share is None for share in shares):
                raise Unfit("some of its parameters have no state")
            for name in ("momentum_buffer", "second_momentum_buffer") if is_muon(group) else ("exp_avg", "exp_avg_sq"):
                parts = [share[name] for share in shares]
                divided = is_muon(group) or param.numel() >= SHARED
                whole = torch.cat(parts) if divided and len(parts) > 1 else parts[0]
                if is_muon(group):
                    count = (len(group["params"]), *param.shape)
                    whole = whole[: count[0]]
                    wanted = count if name == "momentum_buffer" else second_moment_shape(torch.Size(count))
                else:
                    wanted = param.shape
                flat[f"{g}.{i}.{name.replace('second_momentum_buffer', 'second_moment')}"] = _fit(whole, wanted)
            if not is_muon(group):
                flat[f"{g}.{i}.step"] = torch.tensor(int(shares[0]["step"]))
    return flat


def _october(saved: list[Any], config: GPTConfig) -> Flat:
    if len(saved) != 1 or not isinstance(saved[0], list) or len(saved[0]) != 2:
        raise Unfit("it is not that of one AdamW and one Muon")
    adamw, muon = saved[0]
    model = meta_model(config)
    groups, flat = parameter_groups(model), {}
    for g in (0, 1):  # the head, the embedding
        own = adamw["state"][adamw["param_groups"][g]["params"][0]]
        for name in ("exp_avg", "exp_avg_sq"):
            if own[name].shape != (config.vocab_size, config.n_embd):
                raise Unfit("only one of several ranks saved its share")
            flat[f"{g}.0.{name}"] = layout.pad("lm_head.weight", own[name], config).contiguous()
        flat[f"{g}.0.step"] = torch.tensor(int(own["step"]))
    matrices, buffers = list(model.transformer["h"].parameters()), {}
    for group in muon["param_groups"]:
        if any("momentum_buffer" not in muon["state"].get(number, {}) for number in group["params"]):
            raise Unfit("only one of several ranks saved its share")
        kept = [muon["state"][number]["momentum_buffer"] for number in group["params"]]
        params = [p for p in matrices if p.numel() == kept[0].numel()]
        if len(params) != len(kept):
            raise Unfit("its groups of parameters are others")
        buffers.update({p: _fit(one, p.shape) for p, one in zip(params, kept)})
    for g, group in enumerate(groups[2:], start=2):
        stack = torch.stack([buffers[p] for p in group["params"]])  # (K, m, n)
        flat[f"{g}.0.momentum_buffer"] = stack
        flat[f"{g}.0.second_moment"] = torch.zeros(second_moment_shape(stack.shape))
    return flat


def _fit(tensor: Tensor, shape: Any) -> Tensor:
    if tuple(tensor.shape) != tuple(shape):
        raise Unfit(f"a moment is {tuple(tensor.shape)}, wanted {tuple(shape)}")
    return tensor.contiguous()
