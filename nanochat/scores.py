"""The report card's sections on evaluation: chat tasks by stage, CORE, what letters alone are worth; as tables, and as
pictures with intervals. Each score leads to its paragraph of experiments/evaluation.md, which says what it means.

What an older version wrote lacks some of this; it is left out. `sections(run)` is where to start.
"""

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nanochat.dots import Band, picture
from nanochat.evaluate import rounding
from nanochat.evaluate.chatcore import centred, in_words
from nanochat.evaluate.results import STAGES, evaluated
from nanochat.render import Cell, Figure, Link, Section, Table
from nanochat.run import Run
from nanochat.tasks import CHATCORE, TASKS

DASH = "–"
MEANING = Path(__file__).parent.parent / "experiments" / "evaluation.md"
PARAGRAPHS = dict(
    arc_easy="ARC", arc_challenge="ARC", mmlu="MMLU", gsm8k="GSM8K", humaneval="HumanEval", spellingbee="SpellingBee",
    simple_spelling="SpellingBee",
)  # fmt: skip
Results = dict[str, dict[str, Any]]  # by stage


def sections(run: Run) -> list[Section]:
    done, _ = evaluated(run)
    others = {f"{name} (Hugging Face)": found for name, found in done.get("core_hf", {}).items()}
    return [evaluation(run, done), core(run, done.get("core", {}), others), letter_bias(run, done.get("chat", {}))]


def explained(run: Run, text: str, paragraph: str) -> Link:
    """A cell that leads to a paragraph of MEANING, from the run's folder, by its heading as GitHub names it."""
    anchor = re.sub(r"[^\w -]", "", paragraph.lower()).replace(" ", "-")
    path = os.path.relpath(MEANING, run.folder).replace(os.sep, "/")
    return Link(text, f"{quote(path)}#{anchor}")


def of_task(run: Run, name: str, text: str = "") -> Link:
    return explained(run, text or name, PARAGRAPHS.get(name, "The small world's tasks"))


def evaluation(run: Run, done: dict[str, Any]) -> Section:
    blocks: list[Any] = []
    text = [
        (stage, f"{done[stage]['train_bpb']:.4f}", f"{done[stage]['val_bpb']:.4f}") for stage in STAGES if stage in done
    ]
    if text:
        blocks.append(Table((explained(run, "bits per byte of text", "Bits per byte"), "train", "validation"), text))
    chat = done.get("chat", {})
    names = [name for name in TASKS if any(name in chat.get(stage, {}) for stage in STAGES)]
    if names:
        rows: list[list[Cell]] = []
        for name in names:
            link = of_task(run, name, f"{name}: {TASKS[name].description}")
            rows.append([link, *(rate(chat.get(stage, {}).get(name)) for stage in STAGES)])
        cores = done.get("chatcore", {})
        if any(stage in cores for stage in STAGES):
            mean = explained(run, f"ChatCORE: mean of {len(CHATCORE)} tasks, centred by chance", "ChatCORE")
            rows.append([mean, *(in_words(cores[stage]) if cores.get(stage) else DASH for stage in STAGES)])
        blocks.append(Table((explained(run, "task", "Intervals"), *(stage.upper() for stage in STAGES)), rows))
        blocks.append("Questions answered as wanted, with the 95% interval and the number of questions.")
        title = "Chat tasks by stage: share answered as wanted, with 95% intervals; dashed: what guessing scores"
        blocks.append(Figure(title, picture(title, bands(chat, names, done.get("chatcore", {}))), "report_chat.svg"))
    if passes := pass_at_k(run, chat, names):
        blocks.append(passes)
    for stage, found in done.get("int8", {}).items():
        compared = [(name, f"{before:.4f}", f"{after:.4f}") for name, before, after in rounding.lines(found)]
        blocks += [Table((f"int8 weights, {stage}", found["dtype"], "int8"), compared), rounding.verdict(found)]
    return Section("Evaluation", blocks)


def rate(result: dict[str, Any] | None) -> str:
    if result is None:
        return DASH
    return f"{result['rate']:.1%} {result['wanted']} ({result['low']:.1%} to {result['high']:.1%}, n={result['n']})"


def bands(chat: Results, names: list[str], cores: Results) -> list[Band]:
    made = []
    for name in names:
        results = {stage: chat[stage][name] for stage in STAGES if name in chat.get(stage, {})}
        scores = {stage: (found["rate"], found["low"], found["high"]) for stage, found in results.items()}
        made.append(Band(name, scores, TASKS[name].chance))
    whole = {stage: (one["score"], one["low"], one["high"]) for stage, one in cores.items() if stage in STAGES}
    return [*made, Band("ChatCORE", whole)] if whole else made


def pass_at_k(run: Run, chat: Results, names: list[str]) -> Table | None:
    """Where there were several samples of a question."""
    found = [
        (name, stage, chat[stage][name]["pass"])
        for name in names
        for stage in STAGES
        if "pass" in chat.get(stage, {}).get(name, {})
    ]
    if not found:
        return None
    ks = sorted({k for _, _, passes in found for k in passes}, key=int)
    rows: list[list[Cell]] = []
    for name, stage, passes in found:
        shown = [
            f"{one['rate']:.1%} ({one['low']:.1%} to {one['high']:.1%})" if (one := passes.get(k)) else DASH for k in ks
        ]
        drawn = chat[stage][name].get("settings", {})
        how = f"{stage.upper()}, temperature {drawn['temperature']:g}" if "temperature" in drawn else stage.upper()
        rows.append([of_task(run, name), how, *shown])
    return Table(("one of k samples is right", "model", *(f"pass@{k}" for k in ks)), rows)


def core(run: Run, done: Results, others: Results) -> Section:
    """Each task's accuracy with its interval, centred, and beside it what is left of it under each control.

    others: the same of other models, by name.
    """
    blocks: list[Any] = []
    by_task: dict[str, dict[str, dict[str, Any]]] = {}
    for name, found in [*((stage, done[stage]) for stage in STAGES if stage in done), *others.items()]:
        controls = found.get("controls", {})
        rows: list[list[Cell]] = []
        for label, task in found["tasks"].items():
            by_task.setdefault(label, {})[name] = task
            score = f"{task['accuracy']:.1%} ({task['low']:.1%} to {task['high']:.1%}, n={task['n']})"
            kept = [f"{values[label]:.1%}" if label in values else DASH for values in controls.values()]
            cropped = str(task.get("cropped", DASH))
            rows.append([label, score, f"{task['baseline']:.1%}", f"{task['centered']:.4f}", cropped, *kept])
        missing = found["missing"]
        count = f"{len(rows)} of {len(rows) + len(missing)} tasks"
        title = f"CORE, partial: {count}" if found["partial"] else f"CORE: {count}"
        interval = f" ({found['low']:.4f} to {found['high']:.4f})" if "low" in found else ""
        means = [control_mean(found["tasks"], values) for values in controls.values()]
        rows.append([explained(run, title, "CORE"), "", "", f"{found['core']:.4f}{interval}", "", *means])
        head: list[Cell] = [
            explained(run, f"CORE, {name.upper() if name in STAGES else name}", "CORE"),
            "accuracy",
            "guessing",
            "centred",
            "cropped",
        ]
        head += [explained(run, f"control: {control}", "Controls") for control in controls]
        blocks.append(Table(head, rows))
        if missing:
            blocks.append(
                f"Partial: no score without all tasks is to be compared with CORE. Missing: {', '.join(missing)}."
            )
        for label, why in found.get("failed", {}).items():
            blocks.append(f"{label} failed: {why}")
    if by_task:
        made = [
            Band(label, {name: (one["accuracy"], one["low"], one["high"]) for name, one in tasks.items()}, baseline)
            for label, tasks in by_task.items()
            for baseline in [next(iter(tasks.values()))["baseline"]]
        ]
        title = "CORE's tasks: accuracy with 95% intervals; dashed: what guessing scores"
        blocks.append(Figure(title, picture(title, made), "report_core.svg"))
    return Section("CORE", blocks)


def control_mean(tasks: Results, values: dict[str, float]) -> str:
    """CORE as it would be by a control's accuracies, over the tasks that it has."""
    scores = [centred(values[label], task["baseline"]) for label, task in tasks.items() if label in values]
    return f"{sum(scores) / len(scores):.4f}" if scores else DASH


def letter_bias(run: Run, chat: Results) -> Section:
    """Of each task of multiple choice: how often each letter was the answer, and how often it was right."""
    rows: list[list[Cell]] = []
    for name in TASKS:
        for stage in STAGES:
            result = chat.get(stage, {}).get(name, {})
            if "letters" not in result:
                continue
            permuted = result.get("permuted")
            letters = (permuted or result)["letters"]
            said = ", ".join(f"{key} {one['chosen']:.0%} ({one['expected']:.0%})" for key, one in letters.items())
            more = [DASH] * 4
            if permuted:
                where = ", ".join(f"{key} {value:.0%}" for key, value in permuted["by_position"].items())
                interval = f"{permuted['low']:.1%} to {permuted['high']:.1%}"
                more = [
                    f"{result['rate']:.1%}",
                    f"{permuted['rate']:.1%} ({interval})",
                    where,
                    f"{permuted['steady']:.1%}",
                ]
            rows.append([of_task(run, name), f"{stage.upper()}, n={result['n']}", said, *more])
    if not rows:
        return Section("Letter bias", [])
    head = (
        explained(run, "multiple choice", "Letter bias"), "model", "letter: how often chosen (how often right)",
        "right as asked", "right over all orders of the options", "right where the answer's letter was",
        "same option in every order",
    )  # fmt: skip
    return Section("Letter bias", [Table(head, rows)])
