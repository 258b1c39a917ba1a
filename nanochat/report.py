"""The report card of a run: what was trained on what, how it came out, what the model knows and what it makes up.

Every number is from this run's own files; what is missing is a dash. Examples are chosen by rule (the first of each
kind in the fixed order of the questions), never picked. `sections(run)` gathers the content; `nanochat/render.py`
writes it as Markdown and as one self-contained HTML page. What evaluations found is in nanochat/scores.py.
"""

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nanochat import checkpoint, processes, rl_report, scores
from nanochat.evaluate.results import STAGES, evaluated
from nanochat.log import LOG, read_log
from nanochat.render import Curve, Section, Table
from nanochat.run import SCRIPTS, TRAINED, Run
from nanochat.scores import DASH
from nanochat.tasks import TASKS

EXAMPLES = 3  # of each kind


def sections(run: Run) -> list[Section]:
    """The whole report, in order; sections without content are left out."""
    made = [
        environment(run),
        imported(run),
        tokenizer(run),
        stages(run),
        kernel_choices(run),
        rl_report.section(run),
        *scores.sections(run),
        knowledge(run),
        conversations(run),
        samples(run),
    ]
    return [section for section in made if section.blocks]


def missing(run: Run) -> list[str]:
    """What the report has to do without although it was there once, and how it is made again."""
    found = []
    if run.summary("tokenizer") is None and run.stage("tokenizer").is_dir() and not imported(run).blocks:
        found.append(f"{run.stage('tokenizer')} has no summary.json; python -m scripts.tok_train makes it again")
    for stage in TRAINED:
        folder = run.stage(stage)
        made, _ = checkpoint.newest(folder, verify=False)
        if made and "imported" in made.meta:
            continue  # it never had them
        if run.summary(stage) is None and made and made.finished:
            found.append(f"{folder} has no summary.json; python -m scripts.{SCRIPTS[stage]} makes it again")
        logged = len({row["step"] for row in read_log(folder / LOG, aloud=False) if "loss" in row})
        if made and logged < made.step:
            has = f"rows of {logged} of {made.step} steps" if logged else "no row of a step"
            found.append(f"{folder / LOG} has {has}; the others are in no curve")
    found += [
        f"{place} is of another model than the {stage} there now, so it is left out; evaluate again"
        for place, stage in evaluated(run)[1]
    ]
    if run.summary("eval") is None and any(run.stage("eval").glob("*.jsonl")):
        found.append(f"{run.stage('eval')} has no summary.json; base_eval and chat_eval make it again")
    return [*found, *outdated(run)]


def outdated(run: Run) -> list[str]:
    """About each stage that was trained from other weights than those that the run has now of the stages before it."""
    found, before = [], dict[str, str]()
    for stage in TRAINED:
        parent = (run.summary(stage) or {}).get("plan", {}).get("parent")
        if parent and before and parent not in before.values():
            found.append(
                f"{stage} was trained from another model than the {' or '.join(before)} there now; "
                f"python -m scripts.{SCRIPTS[stage]} --fresh trains it from that"
            )
        there, _ = checkpoint.newest(run.stage(stage), verify=False)
        if there:
            before[stage] = there.fingerprint
    return found


def imported(run: Run) -> Section:
    """Models that were not trained here."""
    kept = ((stage, checkpoint.newest(run.stage(stage), verify=False)[0]) for stage in TRAINED)
    rows = [
        (stage, str(made.meta["imported"]), str(made.step)) for stage, made in kept if made and "imported" in made.meta
    ]
    return Section("Imported", [Table(("model", "from", "step"), rows)] if rows else [])


def git_state() -> str:
    """The commit, and whether files differ from it; a dash outside a checkout."""
    here = Path(__file__).parent
    head = processes.git(here, "rev-parse", "--short", "HEAD")
    return head + (" with changes" if processes.git(here, "status", "--porcelain") else "") if head else DASH


def environment(run: Run) -> Section:
    system = f"{platform.system()} {platform.machine()}"
    rows = [
        ("commit", git_state()),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("system", system),
    ]
    return Section("Environment", [Table(("", run.name), rows)])


def tokenizer(run: Run) -> Section:
    made = run.summary("tokenizer")
    if not made:
        return Section("Tokenizer", [])
    ratios = made.get("bytes_per_token", {}).get("validation", {})
    rows = [
        ("vocabulary", f"{made['vocab_size']:,}"),
        (
            "trained on",
            f"{made['characters']:,} characters of {made['wanted']['data']} ({made['wanted']['fingerprint']})",
        ),
        ("bytes per token, validation", ", ".join(f"{name} {value:.2f}" for name, value in ratios.items()) or DASH),
        ("fingerprint", made["fingerprint"]),
    ]
    return Section("Tokenizer", [Table(("", made["wanted"]["data"]), rows)])


ARGUMENTS = (
    "total_batch_size",
    "embedding_lr",
    "unembedding_lr",
    "matrix_lr",
    "scalar_lr",
    "weight_decay",
    "warmdown_ratio",
)


def stages(run: Run) -> Section:
    """One column a stage, and the curves of loss and validation."""
    summaries = {stage: run.summary(stage) for stage in STAGES}
    if not any(summaries.values()):
        return Section("Stages", [])

    def row(title: str, value: Callable[[dict[str, Any]], str]) -> tuple[str, ...]:
        return (title, *(DASH if summary is None else value(summary) for summary in summaries.values()))

    def argument(name: str) -> Callable[[dict[str, Any]], str]:
        return lambda summary: f"{summary['plan'][name]:.4g}" if name in summary["plan"] else DASH

    rows = [
        row("device", lambda s: f"{s['world']} x {s['device']}"),
        row("dtype", lambda s: s["dtype"][6:] + (", compiled" if s["compiled"] else ", eager")),
        row("data (fingerprint)", lambda s: s["data"]),
        row("parameters", lambda s: f"{s['parameters']['total']:,}"),
        *(row(name.replace("_", " "), argument(name)) for name in ARGUMENTS),
        row("steps", lambda s: f"{s['steps']:,}"),
        row("tokens", lambda s: f"{s['tokens']:,}"),
        row("FLOPs", lambda s: f"{s['flops']:.2e}"),
        row("training time", lambda s: f"{s['training_seconds']:.0f} s"),
        row("tokens/s", lambda s: f"{s['tok_per_s']:,.0f}"),
        row("training loss, nats", lambda s: DASH if s.get("stage") == "rl" else f"{s['train_loss']:.4f}"),
        row("validation, bits per byte", lambda s: DASH if s["val_bpb"] is None else f"{s['val_bpb']:.4f}"),
        row("validated on, tokens", lambda s: f"{s['val_tokens']:,}" if s.get("val_tokens") else DASH),
        row("steps skipped", lambda s: str(s["skipped_steps"])),
        row("peak memory", lambda s: f"{s['peak_memory'] / 2**30:.2f} GiB"),
    ]
    with_loss = [stage for stage in TRAINED if summaries[stage] and stage != "rl"]  # rl_report.py has its rewards
    curves = [curve for stage in with_loss for curve in [loss_curve(run, stage)] if curve]
    notes = [f"Note: {sentence}." for sentence in outdated(run)]
    return Section("Stages", [Table(("", *(stage.upper() for stage in STAGES)), rows), *notes, *curves])


def loss_curve(run: Run, stage: str) -> Curve | None:
    points = [(row["step"], row["smooth_loss"]) for row in read_log(run.stage(stage) / LOG) if "smooth_loss" in row]
    return Curve(f"{stage}: training loss (nats, smoothed) by step", points) if len(points) > 1 else None


def latest_chat(run: Run) -> tuple[str, dict[str, Any]]:
    """(stage, results by task) of the last stage whose chat was evaluated."""
    chat = evaluated(run)[0].get("chat", {})
    done = [stage for stage in STAGES if chat.get(stage)]
    return (done[-1], chat[done[-1]]) if done else ("", {})


def knowledge(run: Run) -> Section:
    """How each kind of question was answered, and the first examples of each outcome."""
    stage, results = latest_chat(run)
    blocks: list[Any] = []
    if results:
        rows = [
            (name, *(f"{r['counts'][kind]} of {r['n']}" for kind in ("right", "wrong", "refused")))
            for name, r in results.items()
        ]
        blocks.append(f"Answers of the {stage} model. Wrong answers about people are inventions.")
        blocks.append(Table(("task", "right", "wrong", "refused"), rows))
        for name, result in results.items():
            examples = [
                e for kind in ("right", "wrong", "refused") for e in result["examples"].get(kind, [])[:EXAMPLES]
            ]
            shown = [(e["outcome"], e["question"], e["answer"] or DASH, e["expected"] or DASH) for e in examples]
            blocks.append(Table((f"{name}: first {EXAMPLES} of each kind", "question", "answer", "expected"), shown))
    return Section("What the model knows and what it makes up", blocks)


def conversations(run: Run) -> Section:
    """Four by rule: the first taught fact, sum and invented name answered as wanted, and the first wrong answer."""
    stage, results = latest_chat(run)
    chosen = []
    for name in ("facts_taught", "add_tool", "unknown_names"):
        if name in results:
            chosen += results[name]["examples"].get(results[name]["wanted"], [])[:1]
    wrong = [e for name in TASKS if name in results for e in results[name]["examples"].get("wrong", [])]
    lines = []
    for example in chosen + wrong[:1]:
        tool = f" [python: {'; '.join(example['python'])}]" if example["python"] else ""
        verdict = f"wrong, expected {example['expected']}" if example["outcome"] == "wrong" else example["outcome"]
        lines.append(f"You: {example['question']}\nnanochat:{tool} {example['answer'] or '(nothing)'}\n({verdict})")
    return Section(f"Four conversations with the {stage} model", lines)


def kernel_choices(run: Run) -> Section:
    """Which kernels each stage ran, where that was measured: milliseconds of a shallow step or its update, with each
    group of them and without.
    """
    rows = []
    for stage in STAGES:
        choice = (run.summary(stage) or {}).get("kernels") or {}
        for row in choice.get("rows", []):
            times = (f"{row[key]:.1f} ms" for key in ("on_ms", "off_ms"))
            what = row["group"] + (" (the update alone)" if row.get("of") == "update" else "")
            rows.append((stage, what, *times, "yes" if row["on"] else "no", choice["when"]))
    titles = ("stage", "kernels of", "a step with them", "without", "taken", "measured")
    return Section("Kernels, as measured on this card", [Table(titles, rows)] if rows else [])


def samples(run: Run) -> Section:
    """What each trained model said to the fixed prompts."""
    rows = [(stage, text) for stage in TRAINED for text in (run.summary(stage) or {}).get("samples", [])]
    return Section("Fixed prompts, greedily", [Table(("model", "prompt and answer"), rows)] if rows else [])
