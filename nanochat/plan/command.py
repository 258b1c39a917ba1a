"""The plan for speedrun.sh: the flags of every stage."""

import shlex

from nanochat import evaluation_size, rl_size
from nanochat.plan.record import ON_TOKENS, Plan
from nanochat.presets import Flags
from nanochat.run import Run


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
        given += ["--no-tune"] if not tune and stage in ON_TOKENS else []
        given += ["--fresh"] if fresh and stage in stages else []
        lines.append(f"{stage.upper()}=({shlex.join(given)})")
    for name, flags in zip(("CORE", "CHAT"), evaluation(plan)):
        lines.append(f"{name}=({shlex.join(words(flags))})")
    return "\n".join(lines) + "\n"
