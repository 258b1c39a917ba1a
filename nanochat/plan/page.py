"""The plan for people."""

import torch

from nanochat import presets, sandbox
from nanochat.cadence import checkpoint_bytes, overhead
from nanochat.cost import parameter_counts
from nanochat.gpt import GPTConfig
from nanochat.plan.command import evaluation
from nanochat.plan.decide import OTHER_SECONDS
from nanochat.plan.record import ON_TOKENS, Plan
from nanochat.plan.throughput import ASSUMED_MFU, MEASURED_LAYERS
from nanochat.run import Run
from nanochat.tasks import available


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
        if most := plan.flags.get(stage, {}).get("max_iterations"):
            text += f", at most {most:,} steps"
        if stage == "rl":
            flags = plan.flags["rl"]
            text = f"{flags['num_iterations']} steps of {flags['questions']} questions, {flags['task']} (predicted)"
        if stage == "eval" and plan.evaluation:
            core, chat = evaluation(plan)
            text += f", {core['max_per_task']} of each of CORE's tasks" if core else ", no time for CORE"
            text += f", {chat['max_problems']} each of {str(chat['tasks']).replace(',', ', ')}"
            text += f", about {duration(plan.evaluation)} (predicted)"
            if "humaneval" in available() and "humaneval" not in str(chat["tasks"]):
                lacks = sandbox.missing()
                text += f"; not HumanEval, whose programs cannot be isolated here: this system lacks {lacks}"
        print(f"  {stage:9} {text}" + (f", about {duration(seconds)}" if seconds else ""))
    if plan.rate:
        small = plan.steps.keys() > {"base"}  # a preset that fixes the steps of every stage
        source = (
            f"predicted, at {ASSUMED_MFU:.0%} of the peak"
            if not plan.measured
            else "measured just now"
            if small
            else f"from steps measured on {MEASURED_LAYERS} of its layers: its peak in {plan.dtype} is not known"
        )
        counted = plan.seconds.keys() >= set(ON_TOKENS)  # so it is with a limit, too
        whole = sum(s or 0 for s in plan.seconds.values()) + (OTHER_SECONDS + plan.evaluation if counted else 0)
        part = "all stages" if counted else " and ".join(stage for stage, s in plan.seconds.items() if s)
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
