"""The report of a run, as Markdown: what was trained on what, and how it came out.

Every number is from this run's own files; what is missing is a dash.
"""

import platform
import subprocess
from collections.abc import Sequence
from typing import Any

import torch

from nanochat.run import TRAINED, Run

DASH = "–"


def markdown(run: Run) -> str:
    """The whole report."""
    parts = [f"# Report of run {run.name}", environment(), tokenizer(run), stages(run), evaluation(run), samples(run)]
    return "\n\n".join(part for part in parts if part) + "\n"


def git_state() -> str:
    """The commit, and whether files differ from it; a dash outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return DASH


def environment() -> str:
    rows = [("commit", git_state()), ("Python", platform.python_version()), ("torch", torch.__version__)]
    return table(("", ""), [*rows, ("system", f"{platform.system()} {platform.machine()}")])


def tokenizer(run: Run) -> str:
    made = run.summary("tokenizer")
    if not made:
        return ""
    ratios = made.get("bytes_per_token", {}).get("validation", {})
    rows = [
        ("vocabulary", f"{made['vocab_size']:,}"),
        ("trained on", f"{made['characters']:,} characters of {made['wanted']['data']}"),
        ("bytes per token", ", ".join(f"{name} {value:.2f}" for name, value in ratios.items()) or DASH),
    ]
    return "## Tokenizer\n\n" + table(("", ""), rows)


def stages(run: Run) -> str:
    summaries = {stage: run.summary(stage) for stage in TRAINED}

    def row(title: str, value: Any) -> tuple[str, ...]:
        return (title, *(DASH if s is None else value(s) for s in summaries.values()))

    rows = [
        row("device", lambda s: f"{s['world']} x {s['device']}"),
        row("dtype", lambda s: s["dtype"][6:] + (", compiled" if s["compiled"] else ", eager")),
        row("data", lambda s: s["data"]),
        row("parameters", lambda s: f"{s['parameters']['total']:,}"),
        row("steps", lambda s: f"{s['steps']:,}"),
        row("tokens", lambda s: f"{s['tokens']:,}"),
        row("FLOPs", lambda s: f"{s['flops']:.2e}"),
        row("training time", lambda s: f"{s['training_seconds']:.0f} s"),
        row("tokens/s", lambda s: f"{s['tok_per_s']:,.0f}"),
        row("training loss (nats)", lambda s: f"{s['train_loss']:.4f}"),
        row("validation (bits per byte)", lambda s: DASH if s["val_bpb"] is None else f"{s['val_bpb']:.4f}"),
        row("steps skipped", lambda s: str(s["skipped_steps"])),
        row("peak memory", lambda s: f"{s['peak_memory'] / 2**30:.2f} GiB"),
    ]
    return "## Stages\n\n" + table(("", *TRAINED), rows)


def evaluation(run: Run) -> str:
    done = run.summary("eval") or {}
    parts = []
    text = [
        (stage, f"{done[stage]['train_bpb']:.4f}", f"{done[stage]['val_bpb']:.4f}")
        for stage in TRAINED
        if stage in done
    ]
    if text:
        parts.append("Bits per byte of text:\n\n" + table(("model", "train", "validation"), text))
    chat = done.get("chat", {})
    names = list(dict.fromkeys(name for stage in TRAINED for name in chat.get(stage, {})))
    if names:
        rows = [(name, *(rate(chat.get(stage, {}).get(name)) for stage in TRAINED)) for name in names]
        parts.append("Questions, answered as wanted (95% interval, n):\n\n" + table(("task", *TRAINED), rows))
    return "## Evaluation\n\n" + "\n\n".join(parts) if parts else ""


def rate(result: dict[str, Any] | None) -> str:
    if result is None:
        return DASH
    return f"{result['rate']:.1%} {result['wanted']} ({result['low']:.1%} to {result['high']:.1%}, n={result['n']})"


def samples(run: Run) -> str:
    """What each trained model said to the fixed prompts."""
    lines = []
    for stage in TRAINED:
        for text in (run.summary(stage) or {}).get("samples", []):
            lines.append(f"- {stage}: {text}")
    return "## Samples (greedy, fixed prompts)\n\n" + "\n".join(lines) if lines else ""


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table; bars inside cells are escaped."""

    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *(line(row) for row in rows)])
