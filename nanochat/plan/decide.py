"""From machine, network and flags to a plan: preset, flags of every stage, steps, times."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nanochat import evaluation_size, hardware, measure, presets, rl_size, toolchain
from nanochat.cadence import cadence, checkpoint_bytes, last_tokens
from nanochat.data import choose, hub
from nanochat.errors import UserError
from nanochat.gpt import GPTConfig
from nanochat.plan import throughput
from nanochat.plan.record import ON_TOKENS, Plan
from nanochat.plan.room import SHARD, checkpoints, disk, need_room, shards
from nanochat.presets import Flags, Preset
from nanochat.recipe import horizon
from nanochat.run import Run

SMALL_MINUTES = 15.0  # what the small preset may take unless --max-minutes says otherwise
STARTUP_SECONDS = 12.0  # of a stage: imports, a compiled step from the cache, samples
OTHER_SECONDS = 75.0  # tokenizer, evaluation and report of the small preset
# Of the time to train, where there is a limit, what is kept for one pass over conversations that nobody has counted.
CONVERSATIONS = dict(mid=0.2, sft=0.1)


def make(run: Run, asked: dict[str, Any], nodes: int = 1, rl: bool = False) -> Plan:
    """A new plan from the flags that were given: data, depth, device, max_minutes, seed; for so many machines like this
    one. rl: whether that stage was asked for. Raises UserError.
    """
    depth, data = asked.get("depth"), asked.get("data")
    if depth is not None and depth < 1:
        raise UserError(f"--depth is {depth}, wanted at least 1")
    if asked.get("max_minutes") is not None and asked["max_minutes"] <= 0:
        raise UserError(f"--max-minutes is {asked['max_minutes']:g}, wanted more than 0")
    machine = hardware.setup(asked.get("device") or "")
    cuda = machine.device.type == "cuda"
    if cuda:
        need_toolchain()
    reasons = []
    if data is None:
        reachable, why = hub.reachable() if cuda else (False, f"{machine.device.type} is slow for real data")
        data = "hub" if reachable else "embedded"
        reasons.append(f"data: {data}, because {why}")
    gpus = 1
    if cuda and data != "embedded":
        alike = hardware.gpus_alike()
        gpus = 1 << (alike.bit_length() - 1)  # a power of two divides every batch
        if gpus < torch.cuda.device_count():
            what = "a power of two of those that are alike" if alike < torch.cuda.device_count() else "a power of two"
            reasons.append(f"gpus: {gpus} of {torch.cuda.device_count()}, {what}")
        preset = presets.gpu(machine.memory / 2**30, gpus * nodes, depth, str(machine.dtype)[6:])
    else:
        preset = presets.small(depth, hub=data != "embedded")
    reasons.append(f"preset: {preset.name}" + (f" for {machine.memory / 2**30:.1f} GiB of memory" if cuda else ""))
    reasons.append(f"dtype: {str(machine.dtype)[6:]}, because {machine.dtype_reason}")
    config = preset.config()
    small = preset.name == "small"
    if small:
        batch = int(preset.base["total_batch_size"])
        steps = {stage: int(getattr(preset, stage)["num_iterations"]) for stage in ("base", "mid", "sft")}
    else:
        length = horizon(config, 0.28, float(preset.base["target_param_data_ratio"]))
        batch, steps = length.total_batch_size, dict(base=length.num_iterations)
    plan = Plan(
        run.name,
        asked,
        machine.device.type,
        machine.name,
        gpus,
        data,
        reasons,
        stage_flags(preset, data, machine.device.type, asked.get("seed")),
        asdict(config),
        batch,
        steps,
    )
    if rl_size.wanted(rl, data, machine.device.type):
        add_rl(plan, gpus * nodes)
    plan.rate, plan.measured = throughput.speed(machine, config, preset, gpus * nodes, run)
    limit = asked.get("max_minutes") or (SMALL_MINUTES if small else None)
    set_last(plan)
    fit(plan, limit)
    set_cadence(plan, config)
    plan.disk = disk(plan, config)
    plan.memory, plan.dtype = machine.memory, str(machine.dtype)[6:]
    return plan


def add_rl(plan: Plan, ranks: int) -> None:
    """Puts reinforcement learning into the plan, and what SFT must have seen for it."""
    plan.flags["rl"] = rl_size.flags(plan.data, ranks)
    plan.flags["rl"].update(
        (key, plan.flags["sft"][key]) for key in ("device_type", "seed") if key in plan.flags["sft"]
    )
    if plan.data == "embedded":
        plan.flags["sft"]["word_problems"] = rl_size.WORD_PROBLEMS


def need_toolchain() -> None:
    """Raises UserError when kernels cannot be launched on a GPU, unless they are switched off."""
    if toolchain.wanted() and (missing := toolchain.obstacle()):
        raise UserError(f"{missing}. Without it training runs eagerly and slowly: {toolchain.EAGERLY} to insist")


def stage_flags(preset: Preset, data: str, device: str, seed: int | None) -> dict[str, Flags]:
    """The flags of every stage, with where its data comes from.

    A folder may hold base/ and mid/, sft/ or chat/ folders of its own; without conversations in it, the embedded ones
    are used.
    """
    where = dict.fromkeys(("tokenizer", "base", "mid", "sft"), data)
    if data not in ("embedded", "hub"):
        root = Path(data).resolve()
        where["tokenizer"] = where["base"] = str(root / "base" if (root / "base").is_dir() else root)
        for stage in ("mid", "sft"):
            found = [root / name for name in (stage, "chat") if (root / name).is_dir()]
            where[stage] = str(found[0]) if found else "embedded"
    flags = {stage: dict(data=where[stage], **getattr(preset, stage)) for stage in where}
    for stage in ("base", "mid", "sft"):
        flags[stage]["device_type"] = device
        if seed is not None:
            flags[stage]["seed"] = seed
    return flags


def spread(plan: Plan, nodes: int) -> None:
    """Plans for so many machines: fewer rows at a time where a step would be less than one micro-batch of all ranks.

    Raises UserError where a step cannot be shared out.
    """
    plan.nodes = nodes
    if nodes == 1:
        return
    rows, ranks = int(plan.flags["base"]["device_batch_size"]), nodes * plan.gpus
    row = plan.config["sequence_len"] * ranks
    while rows > 1 and plan.batch % (rows * row):
        rows //= 2
    if plan.batch % row:
        raise UserError(
            f"a step of {plan.batch:,} tokens cannot be shared out among {nodes} machines with {plan.gpus} GPUs each: "
            "take a power of two of machines, or fewer"
        )
    for stage in ON_TOKENS:
        plan.flags[stage]["device_batch_size"] = rows
    if "rl" in plan.flags and int(plan.flags["rl"]["questions"]) % ranks:
        plan.flags["rl"]["questions"] = ranks


def on_this_machine(plan: Plan, nodes: int = 1) -> None:
    """Goes on with a stored plan on the GPUs that are here: as many as it was made for, or fewer, and with fewer rows
    at a time where these have less memory or a larger share each of the optimizer's state. Its steps stay.

    Raises UserError where not even a single row is predicted to fit.
    """
    if plan.device != "cuda" or not torch.cuda.is_available():
        return
    device, planned, before = torch.device("cuda:0"), plan.gpus * plan.nodes, plan.device_name
    plan.gpus = min(1 << (hardware.gpus_alike().bit_length() - 1), max(plan.gpus, planned // nodes))
    plan.device_name, plan.memory = hardware.device_name(device), hardware.memory(device)
    dtype, why = hardware.compute_dtype(device)
    plan.dtype = str(dtype)[6:]
    plan.reasons = [reason for reason in plan.reasons if not reason.startswith("dtype: ")]
    plan.reasons.append(f"dtype: {plan.dtype}, because {why}")
    ranks, there = plan.gpus * nodes, plan.memory / 2**30
    config, usual = GPTConfig(**plan.config), int(plan.flags["base"]["device_batch_size"])
    rows = presets.rows_that_fit(config, usual, ranks, plan.dtype, there)
    if (needed := presets.predicted(config, rows, ranks, plan.dtype)) > there:
        raise UserError(
            f"run {plan.run!r} was planned for {planned} x {before}; with {ranks} x {plan.device_name} it needs "
            f"{needed:.1f} GiB a GPU for a single row, as predicted, of {there:.1f}: go on with more or larger "
            "GPUs, or begin another --run NAME"
        )
    if rows < usual:
        for stage in {*ON_TOKENS, "rl"} & plan.flags.keys():
            plan.flags[stage]["device_batch_size"] = rows
    if plan.device_name != before:
        plan.reasons.append(f"card: its times are those of the {before} that it was planned for")
    if ranks < planned:
        share = ranks / planned
        limit = ", and may take longer than --max-minutes" if "max_minutes" in plan.asked else ""
        plan.reasons = [reason for reason in plan.reasons if not reason.startswith("gpus: ")]
        plan.reasons.append(f"gpus: {ranks}; it was planned for {planned}{limit}")
        plan.rate *= share
        plan.seconds = {stage: seconds and seconds / share for stage, seconds in plan.seconds.items()}


def fit(plan: Plan, max_minutes: float | None) -> None:
    """Sets the time of each stage, and shortens all training alike when together they exceed max_minutes.

    A pass over conversations, of unknown length, ends when the time is over that is kept for it and that others leave.
    """
    rate = plan.rate
    practice, examined = rl_seconds(plan)
    total = sum(steps * plan.batch / rate for steps in plan.steps.values()) + practice
    uncounted = {stage: part for stage, part in CONVERSATIONS.items() if stage not in plan.steps}
    if plan.flags["sft"]["data"] == "hub":
        plan.evaluation = evaluation_size.seconds(max_minutes, total)
    fixed = OTHER_SECONDS + plan.evaluation + examined + STARTUP_SECONDS * (len(ON_TOKENS) + bool(practice))
    limit = float("inf") if max_minutes is None else max_minutes * 60
    if plan.device == "cuda" and min(total, limit) > measure.PAYS * measure.SECONDS:
        fixed += measure.SECONDS
    kept = (limit - fixed) * (1 - sum(uncounted.values()))
    if total > kept:
        share = kept / total
        if share <= 0.02:
            raise UserError(
                f"--max-minutes {max_minutes:g} leaves no time to train: evaluation and start-up alone take "
                f"{fixed / 60:.1f} minutes, and the training of this preset {total / 60:.1f}"
            )
        plan.reasons.append(f"training shortened to {share:.0%} to stay within {max_minutes:g} minutes")
        plan.steps = {stage: max(1, int(steps * share)) for stage, steps in plan.steps.items()}
        for stage, steps in plan.steps.items():
            plan.flags[stage]["num_iterations"] = steps
        if practice:
            plan.flags["rl"]["num_iterations"] = max(1, int(int(plan.flags["rl"]["num_iterations"]) * share))
    plan.seconds = {stage: steps * plan.batch / rate + STARTUP_SECONDS for stage, steps in plan.steps.items()}
    if practice:
        plan.seconds["rl"] = sum(rl_seconds(plan)) + STARTUP_SECONDS
    left = limit - fixed - min(total, kept)
    for stage, part in uncounted.items() if max_minutes is not None else ():
        steps = max(1, int(left * part / sum(uncounted.values()) * rate / plan.batch))
        plan.flags[stage]["max_iterations"] = steps
        plan.seconds[stage] = steps * plan.batch / rate + STARTUP_SECONDS


def rl_seconds(plan: Plan) -> tuple[float, float]:
    """Of its steps, and of its held-out questions: predicted; 0 where it is not in the plan."""
    return rl_size.seconds(plan.data, plan.flags["rl"], plan.rate, plan.device) if "rl" in plan.flags else (0.0, 0.0)


def set_last(plan: Plan) -> None:
    """Puts the size of the last validation into the flags of each training stage; called before a time limit acts."""
    for stage in ON_TOKENS:
        flags = plan.flags[stage]
        flags["eval_tokens"] = last_tokens(stage, flags, plan.steps.get(stage), plan.batch)


def set_cadence(plan: Plan, config: GPTConfig) -> None:
    """Puts into the flags of each training stage how often it validates and saves (nanochat/cadence.py)."""
    size = checkpoint_bytes(config)
    for stage in ON_TOKENS:
        flags, steps = plan.flags[stage], plan.steps.get(stage)
        flags.update(cadence(stage, flags, steps, plan.batch, plan.rate, size, plan.device))


def check(plan: Plan, run: Run, stages: list[str]) -> None:
    """Finds out now what would stop the run later: a missing compiler, data that cannot be read, a full disk."""
    if plan.device == "cuda":
        need_toolchain()
    if "tokenizer" in stages or "base" in stages:
        if plan.flags["base"]["data"] not in ("embedded", "hub") or hub.mirror():
            choose.documents(str(plan.flags["base"]["data"]), 0)
    for stage in ("mid", "sft"):
        data = str(plan.flags[stage]["data"])
        if stage in stages and data not in ("embedded", "hub"):
            choose.conversations(data, stage)
    text = shards(plan) if {"tokenizer", "base"} & {*stages} else 0
    download = SHARD * hub.to_download(text) if text else 0
    need_room(run, checkpoints(GPTConfig(**plan.config), "rl" in plan.flags), download)
