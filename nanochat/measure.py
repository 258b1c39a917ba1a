"""Which of our kernels pay in the compiled training step on this card: measured once, before the first training there.

An op that wins alone may lose in a step, where the compiler would have fused its neighbours: so it is the compiled step
that is timed, of a shallow model of the same width, rows and dtype, with each group of ops on and off, in turns. The
faster stays. Every on or off is a compilation, of what the group is part of and nothing else: the optimizer's group is
timed in an update alone, the others with an optimizer that is not compiled. The groups come in the order of what there
is to gain, and those for which no time is left keep their default. Block sizes are tuned first (kernels/tuning.py).

Rank 0 measures and all ranks use what it found. It is kept for the card in the base folder (kernels/measured.py), and
with the stage, so that a resumed run uses the same kernels. NANOCHAT_KERNELS means that nothing is to be chosen.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kernels import OPS, dispatch, measured, tuning, use
from kernels.registry import Case
from nanochat import trainer
from nanochat.capture import empty_cache
from nanochat.data.loader import Batch
from nanochat.gpt import GPT, GPTConfig
from nanochat.hardware import Hardware
from nanochat.optim import GRAPHS, MuonAdamW, parameter_groups
from nanochat.recipe import Schedule
from nanochat.replay import PLAIN

SECONDS = 180.0  # for all of it: nothing is begun that is expected to end later
PAYS = 5  # times as long as that a training is predicted to take where measuring is worth it
BLOCK_SECONDS = 60.0  # of these, for block sizes
LAYERS = 2  # of the shallow model: one with a short window, one with a full one and a value embedding
TURNS = 11  # timed steps of each of two variants, after those that compile and are captured
GAIN = 0.995  # of the time without it, that a change must stay below; layers are about half of a step so shallow
SLOWER = 1.2  # times the compilations before, that one may take
SMALL = 1 << 12  # elements of a parameter whose update takes no time: nothing is compiled for it
STEADY = Schedule(1 << 30, 40, 0.0, momentum_start=0.95, momentum_peak=0.95)

# Ops that are switched together, first what a wrong choice costs most: the compiler fuses norms with their neighbours;
# attention is a large part of a step, if ours is slow on a card; our product must be about as fast as the vendor's. The
# optimizer, whose updates are a small part and which needs two compilations, comes last.
GROUPS = {
    "norms": ("rms_norm", "mix_rms_norm", "add_rms_norm", "qk_norm_rotary"),
    "attention": ("flash_attention",),
    "MLP": ("mlp_relu2",),
    "fp8": ("fp8_linear", "fp8_mlp_relu2", "fp8_mix_rms_norm", "fp8_add_rms_norm"),
    "head": ("linear_cross_entropy",),
    "embeddings": ("embedding",),
    "optimizer": ("polar_express", "muon_momentum_", "muon_update_", "adamw_"),
}
TEMPLATE = "MLP in Inductor's template"  # comes after the groups: what it gains over our product is the least sure
# Of ops that share rows one is named that training runs; the rows are searched with it.
TUNED = ("flash_attention", "polar_express", "embedding", "mix_rms_norm", "qk_norm_rotary", "cross_entropy")
Say = Callable[[str], None]
Choice = dict[str, Any]


def choose(
    config: GPTConfig, rows: int, hardware: Hardware, fp8: str, say: Say = print, wanted: bool = True
) -> Choice | None:
    """What training of this model, with so many rows at a time, is to run: as known for this card, measured now, or,
    where that is not wanted or fails, as by default, with the block sizes in force now.

    fp8: "", "current" or "delayed"; wanted: whether to measure what is not known (on rank 0, whose `say` it is).
    Returns a dict of `setting` (for kernels.use), `rows` (what was measured; none: nothing was), `left` (groups for
    which no time was left), `blocks`, `card`, `when` and `seconds`; None where there is nothing to choose: no CUDA
    device, or NANOCHAT_KERNELS says it. Collective: every rank calls it.
    """
    if hardware.device.type != "cuda" or not dispatch.is_default():
        return None
    found: list[Choice | None] = [None]
    if hardware.is_main:
        index, key = hardware.device.index or 0, shape(config, rows, hardware, fp8)
        kept = measured.load(index)
        found = [known(kept.get("steps", {}).get(key), say)]
        if found[0] is None and wanted and (made := _measured(config, rows, hardware, fp8, say)):
            measured.store(index, steps={**measured.load(index).get("steps", {}), key: made})
            found = [made]
        found[0] = found[0] or dict(unmeasured(hardware), blocks=measured.blocks(index))
    if hardware.world > 1:
        dist.broadcast_object_list(found, src=0)
    return found[0]


def unmeasured(hardware: Hardware) -> Choice:
    """As `auto` decides, with the block sizes of the code."""
    return dict(
        setting="auto", rows=[], left=[], blocks={}, card=hardware.name, when=date.today().isoformat(), seconds=0.0
    )


def known(choice: Any, say: Say) -> Choice | None:
    """A choice that was kept, or None, said aloud where it lacks something: it is measured again."""
    needed = dict(setting=str, rows=list, left=list, blocks=dict, card=str, when=str)
    whole = isinstance(choice, dict) and all(isinstance(choice.get(key), kind) for key, kind in needed.items())
    if choice is not None and not whole:
        say(f"what was measured before is damaged ({measured.folder()})")
    return choice if whole else None


def shape(config: GPTConfig, rows: int, hardware: Hardware, fp8: str) -> str:
    """What a measured step depends on beside the card, as text; not the depth."""
    sizes = dict(C=config.n_embd, H=config.n_head, K=config.n_kv_head, T=config.sequence_len, V=config.vocab_size)
    rest = dict(rows=rows, windows=config.window_pattern, dtype=str(hardware.dtype)[6:], fp8=fp8)
    return json.dumps({**sizes, **rest})


def adopt(choice: Choice | None) -> None:
    """This process uses a choice's block sizes from now on (the card's own without one); its setting is for use()."""
    measured.adopt(choice["blocks"] if choice else None)
    dispatch.forget()


def cases(config: GPTConfig, rows: int) -> dict[str, list[Case]]:
    """By op, the shapes it has in a training step of this model."""
    T, C, V, L = config.sequence_len, config.n_embd, config.padded_vocab_size, config.n_layer
    heads = dict(B=rows, T=T, H=config.n_head, K=config.n_kv_head, D=config.head_dim)
    windows = sorted({config.window(layer) or -1 for layer in range(L)}, reverse=True)
    wide, stack = dict(N=rows * T, C=C), dict(K=L, m=4 * C, n=C)
    found: dict[str, list[Case]] = {name: [wide] for name in GROUPS["norms"]}
    found |= {name: [dict(wide, F=4 * C)] for name in ("mlp_relu2", *GROUPS["fp8"])}
    found |= {name: [stack] for name in GROUPS["optimizer"]}
    found |= dict(
        qk_norm_rotary=[heads],
        flash_attention=[dict(heads, W=window) for window in windows],
        linear_cross_entropy=[dict(wide, V=config.vocab_size)],
        cross_entropy=[dict(N=4096, V=config.vocab_size)],  # a chunk of the head
        embedding=[dict(wide, V=V)],
        adamw_=[dict(N=V * C)],
    )
    return found


def ready_step(
    model: GPT, hardware: Hardware, batches: Iterator[Batch], rows: int, compiled: bool, updates: bool = True
) -> Callable[[], float]:
    """A call is one step as the training loop takes it, on the next of the batches, and returns its loss.

    This rank takes it by itself, whatever the others do. updates: whether the optimizer is compiled where the model is.
    """
    T, alone = model.config.sequence_len, replace(hardware, rank=0, world=1)
    optimizer = MuonAdamW(parameter_groups(model), model.dtype, alone=True)
    stage = trainer.Stage(
        "step", Path(), model, optimizer, STEADY, trainer.Settings(1 << 30, rows, T, rows * T), alone,
        batches=lambda state: [], val_batches=lambda: [], token_bytes=torch.empty(0), meta={},
        compile=compiled,
    )  # fmt: skip
    run = trainer.runnable(stage, updates)

    def step() -> float:
        outcome = trainer.step(stage, run, batches, 1)
        stage.state.step += 1
        return outcome.loss

    return step


def shallow(config: GPTConfig, hardware: Hardware) -> GPT:
    """A model of few layers."""
    with torch.device("meta"):
        model = GPT(replace(config, n_layer=min(config.n_layer, LAYERS)))
    model.to_empty(device=hardware.device)
    model.init_weights(hardware.dtype)
    return model


def shallow_step(config: GPTConfig, rows: int, hardware: Hardware, fp8: str) -> Callable[[], float]:
    """A step of a shallow model, ready to be timed: forward and backward are compiled, the optimizer is not."""
    model = shallow(config, hardware)
    if fp8:
        model.set_fp8(fp8)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (2, rows, config.sequence_len), generator=generator)
    batch = Batch(ids[0], ids[1], None)  # type: ignore[arg-type]
    return ready_step(model, hardware, iter(lambda: batch, None), rows, compiled=True, updates=False)


def update_step(config: GPTConfig, hardware: Hardware) -> Callable[[], float]:
    """A compiled update of a shallow model's large parameters, from random gradients, ready to be timed."""
    model = shallow(config, hardware)
    groups = [group for group in parameter_groups(model) if group["params"][0].numel() >= SMALL]
    optimizer = MuonAdamW(groups, model.dtype, alone=True)
    optimizer.compile()
    for group in groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)

    def step() -> float:
        optimizer.step()
        return 0.0

    return step


def _measured(config: GPTConfig, rows: int, hardware: Hardware, fp8: str, say: Say) -> Choice | None:
    """What was measured; None, said aloud, where it cannot be: training goes on with what `auto` takes."""
    try:
        with torch.random.fork_rng([]):  # what training draws next stays the same
            return measure(config, rows, hardware, fp8, say)
    except dispatch.Lost as problem:
        raise dispatch.Lost(f"{problem}, or with --no-tune, which measures nothing") from None
    except Exception as problem:  # out of memory, a compiler's failure: training will say it if it meets the same
        dispatch.check_alive("measuring what pays", "--no-tune, which measures nothing")
        say(f"nothing was measured: {type(problem).__name__}: {str(problem).splitlines()[:1]}; kernels as by default")
        torch._dynamo.reset()
        empty_cache()
        return None
    finally:  # ranks adopt the same, each the choice that is handed to it
        measured.adopt(None)
        dispatch.forget()


def measure(
    config: GPTConfig, rows: int, hardware: Hardware, fp8: str, say: Say, clock: Callable[[], float] = time.perf_counter
) -> Choice:
    """Tunes block sizes and times the step with each group on and off, within SECONDS. See `choose`."""
    started, index, shapes = clock(), hardware.device.index or 0, cases(config, rows)
    changes = {group: _change(ops, shapes, hardware, fp8) for group, ops in GROUPS.items()}
    fit = lambda name: not dispatch.unfit(name, hardware.dtype, OPS[name].size(shapes[name][0]), index)
    # AMD's compiler may end the process on what nobody has tried: there no template and only the static block sizes.
    if fit("mlp_relu2") and not fp8 and hardware.dtype != torch.float16 and not torch.version.hip:
        changes[TEMPLATE] = "mlp_relu2=inductor", False
    to_tune = {name: shapes[name] for name in TUNED if fit(name)} if not torch.version.hip else {}
    result = unmeasured(hardware)
    if not any(change for change, _ in changes.values()):
        return dict(result, seconds=clock() - started)  # no kernel of ours is for this card
    say(
        f"measuring what pays on this {hardware.name}: once, about {SECONDS / 60:.0f} minutes (--no-tune skips it; "
        f"kept in {measured.folder()})"
    )
    keep = lambda rows: measured.store(index, blocks=rows)
    blocks = tuning.tune(to_tune, BLOCK_SECONDS, reference=False, say=say, keep=keep)
    made = dict(step=lambda: shallow_step(config, rows, hardware, fp8), update=lambda: update_step(config, hardware))
    variant = lambda kind, setting: Variant(setting, made[kind](), hardware, clock)
    setting, table, left = "auto", [], []
    # Every variant compiles the same functions for other models: more often than Dynamo expects of a function.
    dynamo = torch._dynamo.config
    with dynamo.patch(recompile_limit=max(dynamo.recompile_limit, GRAPHS)):
        best = variant("step", setting)
        compiled = [best.warm()]  # seconds of each compilation of a step; the first also fills caches
        say(f"a step of {LAYERS} layers was compiled in {compiled[0]:.0f} s")
        for group, (change, running) in changes.items():
            if not change:
                continue
            kind = "update" if group == "optimizer" else "step"
            expected = 2 * compiled[0] if kind == "update" else max(compiled[1:] or compiled)
            if clock() - started + SLOWER * expected + 2 * TURNS * best.seconds > SECONDS:
                left.append(group)
                continue
            try:
                before = variant(kind, setting) if kind == "update" else best
                if before is not best:
                    before.warm()
                other = variant(kind, f"{setting},{change}")
                first = other.warm()
                now, then = in_turns(other, before)
            except RuntimeError as problem:  # out of memory, say: what runs stays
                dispatch.check_alive(f"a step with {change}", dispatch.without(*GROUPS.get(group, ("mlp_relu2",))))
                say(f"{group}: not measured: {str(problem).splitlines()[:1]}")
                before = other = best  # what was made is let go
                continue
            taken = now < GAIN * then
            with_ours, without = (then, now) if running else (now, then)
            row = dict(group=group, of=kind, on_ms=1e3 * with_ours, off_ms=1e3 * without, on=taken != running)
            table.append(row)
            say(f"{group}: {1e3 * with_ours:.1f} ms of {kind} with it, {1e3 * without:.1f} without")
            setting = other.setting if taken else setting
            if kind == "step":
                compiled.append(first)
                best = other if taken else best
            del other, before
            torch.cuda.empty_cache()
        if left:
            say(f"no time was left to measure {', '.join(left)}: as by default")
        del best
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    return dict(result, setting=setting, rows=table, left=left, blocks=blocks, seconds=clock() - started)


def _change(ops: tuple[str, ...], shapes: dict[str, list[Case]], hardware: Hardware, fp8: str) -> tuple[str, bool]:
    """(what to add to a setting to switch a group, or "" where there is nothing to switch; whether it runs now)."""
    running = [name for name in ops if _runs(name, shapes[name][0], hardware, fp8)]
    return ",".join(f"{name}=torch" for name in running) or _untaken(ops, shapes, hardware, fp8), bool(running)


def _in_step(name: str, fp8: str) -> bool:
    """Whether such a step has this op, or the one of it in the other precision."""
    both = (*GROUPS["fp8"], "mix_rms_norm", "add_rms_norm", "mlp_relu2")
    return name not in both or name.startswith("fp8") == bool(fp8)


def _runs(name: str, case: Case, hardware: Hardware, fp8: str) -> bool:
    """Whether `auto` runs an op's kernels in such a compiled step."""
    index, size = hardware.device.index or 0, OPS[name].size(case)
    return _in_step(name, fp8) and dispatch.refusal(name, hardware.dtype, size, index, compiled=True) == ""


def _untaken(ops: tuple[str, ...], shapes: dict[str, list[Case]], hardware: Hardware, fp8: str) -> str:
    """A setting that takes kernels which `auto` leaves until they are measured, if they are right here; else ""."""
    index = hardware.device.index or 0
    right = [
        name
        for name in ops
        if _in_step(name, fp8) and not dispatch.obstacle(name, hardware.dtype, shapes[name][0], index)
    ]
    return ",".join(f"{name}=triton" for name in right)


class Variant:
    """A setting and a step that runs under it."""

    def __init__(self, setting: str, step: Callable[[], float], hardware: Hardware, clock: Callable[[], float]):
        self.setting, self.step, self.hardware, self.clock = setting, step, hardware, clock
        self.seconds = math.inf  # of its second step

    def __call__(self) -> float:
        """Seconds of one step."""
        started = self.clock()
        with use(self.setting):
            self.step()
        self.hardware.synchronize()
        return self.clock() - started

    def warm(self) -> float:
        """Steps that are not counted: seconds of the first, which compiles. The last is captured as a graph."""
        first, self.seconds, *_ = [self() for _ in range(PLAIN + 1)]
        return first


def in_turns(*variants: Variant) -> list[float]:
    """Median seconds of a step of each."""
    taken = [[variant() for variant in variants] for _ in range(TURNS)]
    return [statistics.median(times) for times in zip(*taken)]
