"""The plan of a speedrun: looks at machine and network, picks a preset, says what it will do and how long it takes.

The decisions are stored with the run (plan.json), so that a second call goes on with the same numbers whatever has
changed. Times on CPUs and Apple GPUs come from a few real steps run just before; on other GPUs they are predicted, and
say so.
"""

import shlex
import shutil
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_origin

import torch

from nanochat import evaluation_size, hardware, presets, records, rl_size, toolchain
from nanochat.cadence import cadence, checkpoint_bytes, last_tokens, overhead
from nanochat.cost import flops_per_token, parameter_counts
from nanochat.data import choose, hub
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.interrupt import Interrupt
from nanochat.presets import Flags, Preset
from nanochat.recipe import horizon, model_config
from nanochat.run import Run

STAGES = ("tokenizer", "base", "mid", "sft", "rl", "eval", "report")
USUAL = tuple(stage for stage in STAGES if stage != "rl")  # which is in a plan or not: nanochat/rl_size.py
ON_TOKENS = ("base", "mid", "sft")  # stages whose steps are batches of tokens
SMALL_MINUTES = 15.0  # what the small preset may take unless --max-minutes says otherwise
ASSUMED_MFU = 0.4  # on a GPU that nothing has been measured on
STARTUP_SECONDS = 12.0  # of a stage: imports, a compiled step from the cache, samples
OTHER_SECONDS = 75.0  # tokenizer, evaluation and report of the small preset


@dataclass
class Plan:
    """Everything decided. `seconds` by training stage: None where nothing is known."""

    run: str
    asked: dict[str, Any]  # the flags that were given
    device: str
    device_name: str
    gpus: int
    data: str
    reasons: list[str]
    flags: dict[str, Flags]
    config: dict[str, Any]
    batch: int  # tokens per step of base training
    steps: dict[str, int]
    seconds: dict[str, float | None] = field(default_factory=dict)
    rate: float = 0.0  # tokens per second; none in plans of older versions for some GPUs
    measured: bool = False
    disk: int = 0  # bytes
    memory: int = 0  # bytes of one GPU; 0 in plans of older versions
    dtype: str = "bfloat16"  # of the activations
    nodes: int = 1  # machines, of `gpus` each
    evaluation: float = 0.0  # seconds for a sample of CORE and ChatCORE; 0 where neither is asked


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
    config = config_of(preset)
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
    plan.rate, plan.measured = speed(machine, config, preset, gpus * nodes, run)
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


def config_of(preset: Preset) -> GPTConfig:
    base = preset.base
    sizes = {key: base[key] for key in ("max_seq_len", "head_dim", "window_pattern") if key in base}
    return model_config(int(base["depth"]), int(preset.tokenizer["vocab_size"]), **sizes)  # type: ignore[arg-type]


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


MEASURED_LAYERS = 2  # of a large model on a GPU whose peak is not known


def speed(machine: hardware.Hardware, config: GPTConfig, preset: Preset, gpus: int, run: Run) -> tuple[float, bool]:
    """(tokens per second of base training, whether it was measured).

    Predicted from the peak of a known GPU. Measured otherwise: the small preset's model itself, or a model of the same
    width with few layers, whose FLOP/s the whole one is then expected to reach. Raises UserError before that when the
    disk cannot hold the run's checkpoints.
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


def fit(plan: Plan, max_minutes: float | None) -> None:
    """Sets the time of each stage, and shortens all training alike when together they exceed max_minutes."""
    rate = plan.rate
    practice, examined = rl_seconds(plan)
    total = sum(steps * plan.batch / rate for steps in plan.steps.values()) + practice
    if plan.flags["sft"]["data"] == "hub":
        plan.evaluation = evaluation_size.seconds(max_minutes, total)
    fixed = OTHER_SECONDS + plan.evaluation + examined + STARTUP_SECONDS * (len(plan.steps) + bool(practice))
    if max_minutes is not None and total + fixed > max_minutes * 60:
        share = (max_minutes * 60 - fixed) / total
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


def cadence_line(plan: Plan, config: GPTConfig) -> str:
    """For people: what `set_cadence` decided, and the share of each stage's time that it is predicted to take."""
    said, size = [], checkpoint_bytes(config)
    for stage in ON_TOKENS:
        flags = plan.flags[stage]
        every = int(flags["eval_every"])
        share = overhead(flags, plan.steps.get(stage), plan.batch, plan.rate, size, plan.device)
        often = f"every {every} steps {flags['eval_tokens_between']:,} tokens, " if every > 0 else ""
        said.append(
            f"{stage}: {often}at the end {flags['eval_tokens']:,}, saved every {flags['save_every']}: {share:.1%}"
        )
    return "; ".join(said) + " of the time (predicted)"


def checkpoints(config: GPTConfig, stages: int = len(ON_TOKENS)) -> int:
    """Bytes of a run's checkpoints, at most: of each stage, two kept and one being written."""
    return stages * 3 * checkpoint_bytes(config)


def disk(plan: Plan, config: GPTConfig) -> int:
    """Bytes that the run's artifacts and downloads will take, at most, while a checkpoint is being written."""
    total = checkpoints(config, len(ON_TOKENS) + ("rl" in plan.flags))
    if plan.data == "hub" and not hub.mirror():
        total += hub.shards_for(plan.steps["base"] * plan.batch) * 100_000_000
    return total


def path(run: Run) -> Path:
    return run.folder / "plan.json"


def store(plan: Plan, run: Run) -> None:
    records.write(path(run), asdict(plan))


def load(run: Run, asked: dict[str, Any]) -> Plan | None:
    """The stored plan of a run, or None.

    Raises UserError when it is damaged, or when flags given now differ from those it was made with.
    """
    there = path(run)
    remedy = "put a copy in its place, or delete it and give the first call's flags again"
    content = records.read(there, remedy)
    if content is None:
        return None
    try:
        plan = Plan(**content)
        GPTConfig(**plan.config)
        for needed in fields(Plan):
            kind = needed.type if isinstance(needed.type, type) else get_origin(needed.type)
            if not isinstance(getattr(plan, needed.name), (int, float) if kind is float else kind):  # type: ignore
                raise TypeError(f"{needed.name} is of another type")
        if not set(ON_TOKENS) | {"tokenizer"} <= plan.flags.keys():
            raise TypeError("the flags of a stage are missing")
    except (TypeError, ValueError) as problem:
        raise UserError(f"{there} is damaged: {problem}; {remedy}") from None
    if plan.run != run.name:
        raise UserError(f"{there} is the plan of run {plan.run!r}; {remedy}")
    for key, value in asked.items():
        if plan.asked.get(key) != value:
            before = plan.asked.get(key)
            raise UserError(
                f"run {run.name!r} was planned with --{key.replace('_', '-')} {'unset' if before is None else before}, "
                f"not {value}; give another --run NAME, or --fresh to start over"
            )
    return plan


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
    need_room(run, plan.disk)


def need_room(run: Run, size: int) -> None:
    """Raises UserError when the disk cannot hold a run of so many bytes, what it has already among them."""
    folder = run.folder
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    has = sum(file.stat().st_size for file in run.folder.rglob("*") if file.is_file())
    if free + has < size:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free and this run needs about {(size - has) / 1e9:.1f}; free some, or "
            "put NANOCHAT_BASE_DIR on another disk"
        )


def show(plan: Plan, run: Run, stages: list[str]) -> None:
    """Prints the plan for people."""
    config = GPTConfig(**plan.config)
    total = parameter_counts(config)["total"]
    how = f"{plan.gpus} x {plan.device_name}" if plan.device == "cuda" else f"{plan.device} ({plan.device_name})"
    how = f"{plan.nodes} machines, each {how}" if plan.nodes > 1 else how
    print(f"\nrun {plan.run}: {run.folder}\n  machine   {how}")
    for reason in plan.reasons:
        name, _, text = reason.partition(": ")
        print(f"  {name:9} {text}" if text else f"  note      {reason}")
    if plan.device == "cpu" and plan.asked.get("device") is None and torch.cuda.is_available():
        print("  note      planned when no GPU could be used; --fresh plans it again for the one that is here")
    print(
        f"  model     {config.n_layer} layers, width {config.n_embd}, context {config.sequence_len}, vocabulary "
        f"{config.vocab_size:,}: {total / 1e6:.1f} M parameters"
    )
    if plan.device == "cuda" and plan.data != "embedded":
        print(memory(plan, config))
    for stage in stages:
        steps, seconds = plan.steps.get(stage), plan.seconds.get(stage)
        text = f"{steps:,} steps, {steps * plan.batch / 1e6:,.1f} M tokens" if steps else STAGE_TEXT[stage]
        if stage == "rl":
            flags = plan.flags["rl"]
            text = f"{flags['num_iterations']} steps of {flags['questions']} questions, {flags['task']} (predicted)"
        if stage == "eval" and plan.evaluation:
            core, chat = evaluation(plan)
            text += f", {core['max_per_task']} of each of CORE's tasks" if core else ", no time for CORE"
            text += f", {chat['max_problems']} each of {str(chat['tasks']).replace(',', ', ')}"
            text += f", about {duration(plan.evaluation)} (predicted)"
        print(f"  {stage:9} {text}" + (f", about {duration(seconds)}" if seconds else ""))
    if plan.rate:
        small = plan.steps.keys() > {"base"}  # a preset that fixes the steps of every stage
        source = (
            f"predicted, at {ASSUMED_MFU:.0%} of the peak"
            if not plan.measured
            else "measured just now"
            if small
            else f"from steps measured on {MEASURED_LAYERS} of its layers: no peak is known for this GPU"
        )
        whole = sum(s or 0 for s in plan.seconds.values()) + (OTHER_SECONDS + plan.evaluation if small else 0)
        part = "all stages" if small else "base training"
        print(f"  time      about {duration(whole)} for {part}, at {plan.rate:,.0f} tokens/s ({source})")
    if "eval_tokens_between" in plan.flags["base"]:  # a plan stored by an older version has no cadence
        print(f"  validate  {cadence_line(plan, config)}")
    print(f"  disk      at most {plan.disk / 1e9:.2f} GB", flush=True)


def memory(plan: Plan, config: GPTConfig) -> str:
    """Predicted memory of base training by part, largest first; what is less than a hundredth of it is added up."""
    parts = presets.memory(config, int(plan.flags["base"]["device_batch_size"]), plan.gpus * plan.nodes, plan.dtype)
    total = sum(parts.values())
    shown = {name: size for name, size in sorted(parts.items(), key=lambda part: -part[1]) if size > 0.01 * total}
    shown["the rest"] = total - sum(shown.values())
    share = f", {total / plan.memory:.0%} of its {plan.memory / 2**30:.1f}" if plan.memory else ""
    lines = [f"  memory    {total / 2**30:.1f} GiB per GPU{share} (predicted)"]
    lines += [f"            {size / 2**30:5.1f}  {name}" for name, size in shown.items()]
    return "\n".join(lines)


STAGE_TEXT = {
    "tokenizer": "byte-level BPE",
    "base": "pretraining",
    "mid": "one pass over the conversations",
    "sft": "one pass over the conversations",
    "rl": "reinforcement learning",
    "eval": "bits per byte, questions with known answers",
    "report": "report.md",
}


def duration(seconds: float) -> str:
    """For people: "40 s", "12 min", "3.5 h"."""
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def evaluation(plan: Plan) -> tuple[Flags, Flags]:
    """The flags of base_eval for CORE and of chat_eval, {} where it is not run: of conversations of one's own."""
    data = plan.flags["sft"]["data"]
    if data == "embedded":
        return {}, dict(max_new_tokens=32, **(dict(tasks=rl_size.evaluated()) if "rl" in plan.flags else {}))
    if data != "hub":
        return {}, {}
    rate = plan.rate / (plan.gpus * plan.nodes)  # one device evaluates
    seconds = plan.evaluation or evaluation_size.SECONDS[0]  # a plan of an older version has none
    return evaluation_size.flags(
        seconds, rate, plan.device, plan.config["sequence_len"], len(ON_TOKENS) + ("rl" in plan.flags)
    )


def words(flags: Flags) -> list[str]:
    """For a command line."""
    return [f"--{key.replace('_', '-')}={value}" for key, value in flags.items()]


def shell(plan: Plan, run: Run, stages: list[str], fresh: bool, tune: bool = True) -> str:
    """Assignments for speedrun.sh: names, and for each stage an array of its flags."""
    lines = [
        f"RUN={shlex.quote(plan.run)}",
        f"RUN_DIR={shlex.quote(str(run.folder))}",
        f"STAGES=({' '.join(stages)})",
        f"GPUS={plan.gpus}",
        f"DATA={shlex.quote(str(plan.flags['base']['data']))}",
        f"DEVICE={plan.device}",
    ]
    for stage, flags in plan.flags.items():
        given = words(flags)
        given += ["--no-tune"] if not tune and stage != "tokenizer" else []
        given += ["--fresh"] if fresh and stage in stages else []
        lines.append(f"{stage.upper()}=({shlex.join(given)})")
    for name, flags in zip(("CORE", "CHAT"), evaluation(plan)):
        lines.append(f"{name}=({shlex.join(words(flags))})")
    return "\n".join(lines) + "\n"
