"""Muon for matrices and AdamW for the rest, in one optimizer, on one process or sharded over ranks.

Every parameter belongs to a group of kind "adamw" or "muon"; a Muon group holds matrices of one shape, which live in
one tensor, the group's bank, and are updated together. On several ranks nothing wraps the model: `step()` itself
averages the gradients, and each rank keeps moments for, and updates, only its share (ZeRO-2):

    reduce-scatter all gradients   →   update own share, group by group   →   all-gather the new values

An AdamW share is a range of rows, a Muon share a range of whole matrices. Parameters that do not divide (scalars, odd
row counts) are averaged and updated everywhere.

Where a reduced gradient has a NaN or an infinity on any rank, no rank changes anything: the device finds out, hands a
flag to the updates (`found_inf`), and the host reads it later (`finish_step`).

The arithmetic is in `kernels/optim.py` and `kernels/newton_schulz.py`. Groups and defaults are nanochat's; sharding:
Rajbhandari et al., ZeRO, arXiv:1910.02054. Read `step` first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import muon_momentum_, muon_update_, polar_express
from kernels.optim import adamw_apply_, adamw_factors, second_moment_shape
from nanochat.late import Late


def parameter_groups(
    model: Any,
    unembedding_lr: float = 0.004,
    embedding_lr: float = 0.2,
    matrix_lr: float = 0.02,
    scalar_lr: float = 0.5,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """A GPT's parameters in groups with their learning rates, betas and decays.

    The rates of tables (head, token and value embeddings) are for width 768 and scale with 1/√width. `weight_decay` is
    Muon's; the AdamW groups have their own, fixed.
    """
    table = math.sqrt(768 / model.config.n_embd)

    def adamw(params: list[Any], lr: float, betas: tuple[float, float], weight_decay: float) -> dict[str, Any]:
        return dict(kind="adamw", params=params, lr=lr, betas=betas, eps=1e-10, weight_decay=weight_decay)

    groups = [
        adamw([model.lm_head.weight], unembedding_lr * table, (0.8, 0.96), 0.01),
        adamw([model.transformer["wte"].weight], embedding_lr * table, (0.8, 0.995), 0.001),
        adamw([e.weight for e in model.value_embeds.values()], embedding_lr * table * 0.5, (0.8, 0.995), 0.01),
    ]
    if model.config.residual_mix:
        groups.append(adamw([model.resid_lambdas], scalar_lr * 0.01, (0.8, 0.95), 0.05))
        groups.append(adamw([model.x0_lambdas], scalar_lr, (0.96, 0.95), 0.0))
    gates: list[Any] = [model.smear_gate.weight, model.smear_lambda] if model.config.smear else []
    gates += [model.backout_lambda] if model.config.backout else []
    groups.append(adamw(gates, 0.2, (0.8, 0.95), 0.0))

    by_shape: dict[torch.Size, list[Tensor]] = {}
    for matrix in model.transformer["h"].parameters():
        by_shape.setdefault(matrix.shape, []).append(matrix)
    for _, params in sorted(by_shape.items()):
        groups.append(
            dict(kind="muon", params=params, lr=matrix_lr, momentum=0.95, beta2=0.9, steps=5, weight_decay=weight_decay)
        )
    groups = [group for group in groups if group["params"]]
    for group in groups:
        group["initial_lr"], group["initial_weight_decay"] = group["lr"], group["weight_decay"]
    return groups


# Of an update that nothing fuses, a CPU does so many elements at a time, so that what is in between stays in its cache:
# 6 times as fast. A table as large as LARGE is worth compiling for, which is 4 to 20 times as fast again.
CACHED = 1 << 17
LARGE = 1 << 19
GRAPHS = 64  # of one function of the optimizer, compiled for so many shapes, dtypes and settings at most


class MuonAdamW(torch.optim.Optimizer):
    """See the module. `dtype` is the one in which Muon orthogonalises: bfloat16 where the model computes in it."""

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype = torch.float32, alone: bool = False):
        """alone: no other rank takes these steps, although there are others."""
        super().__init__(groups, defaults={})
        self.dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        ranks = dist.is_initialized() and not alone
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if ranks else (0, 1)
        self._adamw, self._muon = adamw_apply_, _muon_step_  # as `compile` made them, where it was called
        self._compiled = False
        self._scalars: dict[tuple[str, str], Tensor] = {}
        self._banks = {group["params"][0]: self._bank(group["params"]) for group in self.param_groups if is_muon(group)}
        self._gradients: dict[Tensor, Tensor] = {}  # banks of gradients by a group's first matrix, where they are kept
        self._shadows: list[tuple[Tensor, Tensor]] = []  # (parameter, its copy)
        self._kept: list[Tensor] = []  # all gradients, where they are never given away: those banks, and the others
        self.found_inf = torch.zeros((), dtype=torch.int32)  # on the device: 1 where the last step changed nothing
        self._skip: Tensor | None = None  # the same for the updates, where they are queued before the host can know
        self._verdict: Late | None = None  # the same on its way to the host
        self._taken: bool | None = None  # known, and not yet asked for

    def compile(self) -> None:
        """Has the updates compiled; on a CPU, those of large tables only: Muon's time is in its products."""
        self._compiled = True
        # A graph for each shape and dtype, times the settings of kernels.use(): more than Dynamo expects of a function.
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
        self._adamw = torch.compile(adamw_apply_, dynamic=False, fullgraph=True)
        if self.param_groups[0]["params"][0].is_cuda:
            self._muon = torch.compile(_muon_step_, dynamic=False, fullgraph=True)

    def _bank(self, params: list[Tensor]) -> Tensor:
        """Moves matrices into one tensor (K, m, n); every rank owns the same number of them, some of them padding."""
        bank = params[0].new_zeros((len(params) + -len(params) % self.world, *params[0].shape))
        for p, place in zip(params, bank):
            place.copy_(p.detach())
            p.data = place
        return bank

    def shadow(self, param: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of a matrix to compute with, refreshed by `step`: instead of a cast at every use.

        Its gradients are added to the parameter's, which are kept (`keep_gradients`), in the parameter's dtype.
        Whoever changes the parameter otherwise, as by loading a state dict, makes shadows after it.
        """
        copy = param.detach().to(dtype, copy=True).requires_grad_()

        def add(copy: Tensor) -> None:
            if copy.grad is not None:  # else the product that made it has added it
                assert param.grad is not None
                param.grad += copy.grad
                copy.grad = None

        copy.register_post_accumulate_grad_hook(add)
        self._shadows.append((param, copy))
        return copy

    def forget_shadows(self) -> None:
        """After a backward that failed half way: what it left is added to nothing."""
        for _, copy in self._shadows:
            copy.grad = None

    def keep_gradients(self) -> None:
        """Gives every parameter a gradient that stays where it is: whoever computes one adds to it in place.

        `zero_grad` fills them with zeros. Those of a Muon group lie in a bank, from which `step` takes them.
        """
        for group in self.param_groups:
            params = group["params"]
            if is_muon(group):
                bank = self._gradients[params[0]] = torch.zeros_like(self._banks[params[0]])
                self._kept.append(bank)
                places = list(bank)
            else:
                places = [torch.zeros_like(p) for p in params]
                self._kept += places
            for p, place in zip(params, places):
                p.grad = place

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's, but where gradients are kept."""
        if self._kept:
            torch._foreach_zero_(self._kept)
        else:
            super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: None = None, scale: float = 1.0) -> None:  # type: ignore[override]
        """One update of every parameter from its gradient, averaged over the ranks and multiplied by `scale`.

        Nothing is changed, to the bit, where one of these gradients is not finite: see `found_inf` and `finish_step`.
        """
        self.finish_step()
        reduced = [self._reduce(group) for group in self.param_groups]
        for work in [work for group in reduced for work, _ in group if work is not None]:
            work.wait()  # once: gloo's copies its result again with each
        shares = [[grad for _, grad in group] for group in reduced]
        grads = [grad for group in shares for grad in group]
        if scale != 1:
            torch._foreach_mul_(grads, scale)
        self.found_inf = not_finite(grads)
        if self.world > 1:
            dist.all_reduce(self.found_inf, op=dist.ReduceOp.MAX)
        if not self.found_inf.is_cpu:
            self._verdict, self._skip = Late(self.found_inf), self.found_inf
        else:
            self._taken = not self.found_inf.item()
            if not self._taken:
                return
        gathers: list[Any] = []
        for group, own in zip(self.param_groups, shares):
            gathers += (self._muon_group if is_muon(group) else self._adamw_group)(group, own)
        for work in gathers:
            work.wait()
        if self._shadows:
            params, copies = zip(*self._shadows)
            torch._foreach_copy_(list(copies), list(params))

    def finish_step(self) -> bool | None:
        """Whether the last step was taken (False: skipped), for whoever asks first; None for others.

        But on a CPU, `step` returns before that is known, and this waits until it is.
        """
        taken, self._taken = self._taken, None
        if self._verdict is not None:
            taken, self._verdict = not self._verdict.read()[0], None
            for state in self.state.values() if not taken else ():
                if "step" in state:
                    state["step"] -= 1  # it was counted when it was queued
        return taken

    # ---- communication: what each rank owns

    def _divides(self, param: Tensor) -> bool:
        return self.world > 1 and param.ndim > 1 and param.size(0) % self.world == 0

    def _reduce(self, group: dict[str, Any]) -> list[tuple[Any, Tensor]]:
        """Starts averaging a group's gradients: (work, this rank's gradient) for each parameter, or for the stack."""
        if not is_muon(group):
            return [self._average(p.grad, scatter=self._divides(p)) for p in group["params"]]
        first = group["params"][0]
        if first.data_ptr() != self._banks[first].data_ptr():
            raise RuntimeError("MuonAdamW: the model was moved or cast after its optimizer was made; make it again")
        stack = self._gradients.get(first)  # (K, m, n)
        if stack is None:
            grads = [p.grad for p in group["params"]]
            stack = torch.stack(grads + [torch.zeros_like(first)] * (self._banks[first].size(0) - len(grads)))
        return [self._average(stack, scatter=self.world > 1)]

    def _average(self, grad: Tensor, scatter: bool) -> tuple[Any, Tensor]:
        if self.world == 1:
            return None, grad
        grad = grad.contiguous().div_(self.world)
        if not scatter:
            return dist.all_reduce(grad, async_op=True), grad
        share = torch.empty_like(grad[: grad.size(0) // self.world])
        return dist.reduce_scatter_tensor(share, grad, async_op=True), share

    def _mine(self, tensor: Tensor) -> Tensor:
        """This rank's range of the first dimension."""
        size = tensor.size(0) // self.world
        return tensor[self.rank * size : (self.rank + 1) * size]

    # ---- updates

    def _adamw_group(self, group: dict[str, Any], grads: list[Tensor]) -> list:
        gathers = []
        for p, grad in zip(group["params"], grads):
            sharded = self._divides(p)
            mine = self._mine(p) if sharded else p
            state = self.state[p]
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(mine), exp_avg_sq=torch.zeros_like(mine))
            state["step"] += 1
            tensors = (mine, grad, state["exp_avg"], state["exp_avg_sq"])
            fused = self._compiled and (p.is_cuda or mine.numel() >= LARGE)
            whole = fused or p.is_cuda
            chunks = [tensors] if whole else list(zip(*(t.reshape(-1).split(CACHED) for t in tensors)))
            (beta1, beta2), eps, decay = group["betas"], group["eps"], group["weight_decay"]
            factors = adamw_factors(state["step"], group["lr"], beta1, beta2, eps, decay)
            scalars = [self._scalar(p, f"adamw {i}", float(factor), fused) for i, factor in enumerate(factors)]
            for values, g, first, second in chunks:
                (self._adamw if fused else adamw_apply_)(values, g, first, second, scalars, self._skip)
            if sharded:
                gathers.append(dist.all_gather_into_tensor(p, mine.clone(), async_op=True))
        return gathers

    def _muon_group(self, group: dict[str, Any], grads: list[Tensor]) -> list:
        first, grad = group["params"][0], grads[0]
        m, n = first.shape
        bank = self._banks[first]
        mine, fused = self._mine(bank), self._compiled and first.is_cuda  # (K', m, n)
        state = self.state[first]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(mine)
            state["second_moment"] = mine.new_zeros(second_moment_shape(mine.shape))
        self._muon(
            mine,
            grad,
            state["momentum_buffer"],
            state["second_moment"],
            self._scalar(first, "lr", group["lr"] * max(1.0, m / n) ** 0.5, fused),
            self._scalar(first, "momentum", group["momentum"], fused),
            self._scalar(first, "weight_decay", group["weight_decay"], fused),
            group["beta2"],
            group["steps"],
            self.dtype,
            self._skip,
        )
        return [dist.all_gather_into_tensor(bank, mine.clone(), async_op=True)] if self.world > 1 else []

    def _scalar(self, param: Tensor, name: str, value: float, fused: bool) -> float | Tensor:
        """Compiled updates take scalars as 0-d tensors, so that a new learning rate does not compile again."""
        if not fused:
            return value
        return self._scalars.setdefault((str(param.dtype), name), torch.zeros(())).fill_(value)

    # ---- state on disk: whole tensors, whatever the number of ranks

    def full_state(self) -> dict[str, Tensor]:
        """All moments as "group.parameter.name" → tensor, gathered from the ranks (call it on every rank)."""
        return {name: moment.whole() for name, moment in self.moments().items()}

    def moments(self) -> dict[str, Moment]:
        """The same, each to be gathered when it is wanted: who lets go of it before the next never holds them all."""
        self.finish_step()
        found = {}
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                for name, value in self.state.get(p, {}).items():
                    value = torch.tensor(value) if name == "step" else value
                    shared = name != "step" and self.world > 1 and (is_muon(group) or self._divides(p))
                    rows = len(group["params"]) if is_muon(group) else value.size(0) * self.world if shared else 0
                    found[f"{g}.{i}.{name}"] = Moment(value, self.world, rows) if shared else Moment(value)
        return found

    def state_bytes(self) -> int:
        """Of all ranks' moments together, at most."""
        tensors = (value for state in self.state.values() for value in state.values() if isinstance(value, Tensor))
        return self.world * sum(tensor.nbytes for tensor in tensors)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all moments, by their names in `full_state`, once steps were taken."""
        found: dict[str, tuple[int, ...]] = {}
        for g, group in enumerate(self.param_groups):
            if is_muon(group):
                stack = (len(group["params"]), *group["params"][0].shape)
                found[f"{g}.0.momentum_buffer"] = stack
                found[f"{g}.0.second_moment"] = second_moment_shape(torch.Size(stack))
                continue
            for i, p in enumerate(group["params"]):
                found.update({f"{g}.{i}.step": (), f"{g}.{i}.exp_avg": p.shape, f"{g}.{i}.exp_avg_sq": p.shape})
        return found

    def load_full_state(self, flat: dict[str, Tensor]) -> None:
        """The inverse of `full_state`, for any number of ranks. Raises ValueError when the groups differ."""
        wanted = self._shapes()
        for key, value in flat.items():
            if key not in wanted:
                raise ValueError(f"MuonAdamW: saved state {key} belongs to no parameter of this model")
            if tuple(value.shape) != tuple(wanted[key]) or value.is_floating_point() == key.endswith(".step"):
                kind = f"{value.dtype} {tuple(value.shape)}"
                raise ValueError(f"MuonAdamW: saved state {key} is {kind}, wanted shape {tuple(wanted[key])}")
        if flat and (missing := [key for key in wanted if key not in flat]):
            raise ValueError(f"MuonAdamW: saved state {missing[0]} is missing")
        self.state.clear()
        for key, value in flat.items():
            g, i, name = key.split(".")
            group = self.param_groups[int(g)]
            p = group["params"][int(i)]
            if name == "step":
                self.state[p][name] = int(value)
                continue
            if group["kind"] == "muon" and (padding := -value.size(0) % self.world):
                value = torch.cat((value, value.new_zeros((padding, *value.shape[1:]))))
            if self.world > 1 and (group["kind"] == "muon" or self._divides(p)):
                value = self._mine(value)
            self.state[p][name] = value.to(p.device, copy=True)


@dataclass(frozen=True)
class Moment:
    """A tensor of the optimizer's state, of which each of `world` ranks has a range of rows, `mine`, the last ones
    perhaps padding; of one rank, all of it.
    """

    mine: Tensor
    world: int = 1
    rows: int = 0  # of the whole, where it is shared

    @property
    def dtype(self) -> torch.dtype:
        return self.mine.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.mine.shape[1:]) if self.world > 1 else tuple(self.mine.shape)

    def whole(self) -> Tensor:
        """Collective: all ranks call it for the same moments in the same order."""
        if self.world == 1:
            return self.mine
        gathered = self.mine.new_empty((self.mine.size(0) * self.world, *self.mine.shape[1:]))
        dist.all_gather_into_tensor(gathered, self.mine)
        return gathered[: self.rows]


def is_muon(group: dict[str, Any]) -> bool:
    return group["kind"] == "muon"


def _muon_step_(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    second_moment: Tensor,
    lr: float | Tensor,
    momentum: float | Tensor,
    weight_decay: float | Tensor,
    beta2: float,
    steps: int,
    dtype: torch.dtype,
    skip: Tensor | None,
) -> None:
    """Momentum, orthogonalisation and step for a stack of matrices (K, m, n), in place; nothing changes with `skip`."""
    g = muon_momentum_(grad, momentum_buffer, momentum, dtype, skip)
    muon_update_(param, polar_express(g, steps), second_moment, lr, weight_decay, beta2, skip)


def not_finite(tensors: list[Tensor]) -> Tensor:
    """0-d int32 on their device: 1 where any element is NaN or infinite. One pass, many tensors a launch.

    A CPU adds many times as fast as it takes this norm, and a finite sum has no such element: only tensors without one
    have their norm taken.
    """
    tensors = [t for t in tensors if not t.is_cpu or not t.sum().isfinite().item()]
    if not tensors:
        return torch.zeros((), dtype=torch.int32)
    kinds = {tensor.dtype for tensor in tensors}
    norms = [n for kind in kinds for n in torch._foreach_norm([t for t in tensors if t.dtype == kind], math.inf)]
    return (~torch.stack([norm.float() for norm in norms]).isfinite().all()).int()
