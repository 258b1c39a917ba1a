"""Where results are kept: in the summary of a run's evaluations; of chat tasks every failing example beside it.

They are written after each task, so that what comes later can lose nothing; results of other tasks and stages stay.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

from nanochat import checkpoint, records
from nanochat.errors import UserError
from nanochat.evaluate.chat_tasks import TaskResult
from nanochat.evaluate.chatcore import chatcore, in_words
from nanochat.files import write_atomically
from nanochat.locks import turn
from nanochat.run import TRAINED, Run

STAGES = TRAINED
WHOLE = dict(core="CORE", chatcore="ChatCORE")  # of all of a stage's tasks together


def failures_file(run: Run, source: str) -> Path:
    return run.stage("eval") / f"{source}_failures.jsonl"


def failures(run: Run, source: str) -> list[dict[str, Any]]:
    """Every failing example of a stage, with "task". Raises UserError for a file that is damaged."""
    return records.rows(failures_file(run, source), "delete it and evaluate again")


def check_place(run: Run) -> None:
    """Raises OSError where results could not be kept: before the work that makes them."""
    with turn(run.stage("eval") / ".lock"):
        pass


def keep(run: Run, source: str, result: TaskResult, settings: dict[str, Any], model: str) -> None:
    """Stores a stage's result in a task, with how it was asked, in place of the one before. model: the weights'
    fingerprint. Raises UserError where what is there is damaged.
    """
    name = result.task.name
    with turn(run.stage("eval") / ".lock"):  # another stage may be evaluated at the same time
        kept = [row for row in failures(run, source) if row.get("task") != name] + result.failures
        write_atomically(failures_file(run, source), "".join(json.dumps(row) + "\n" for row in kept).encode())
        everything = run.summary("eval") or {}
        chat, cores = everything.get("chat", {}), everything.get("chatcore", {})
        tasks = {**chat.get(source, {}), name: dict(result.numbers(), settings=settings, model=model)}
        core = chatcore({task: one for task, one in tasks.items() if one.get("model", model) == model})
        cores = {**cores, source: dict(core, model=model)} if core else cores
        run.write_summary("eval", {**everything, "chat": {**chat, source: tasks}, "chatcore": cores})


def keep_entry(run: Run, source: str, result: dict[str, Any], part: str = "") -> None:
    """Puts a stage's, or another model's, result into the summary, or into a part of it."""
    with turn(run.stage("eval") / ".lock"):
        everything = run.summary("eval") or {}
        (everything.setdefault(part, {}) if part else everything)[source] = result
        run.write_summary("eval", everything)


def evaluated(run: Run) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """(the summary of evaluations, of the models that the run has now; what was left out of it, with its stage).

    Results of older versions do not say which model they are of, and stay.
    """
    done, left_out = run.summary("eval") or {}, []
    for stage in STAGES:
        there, _ = checkpoint.newest(run.stage(stage), verify=False)
        if not there:
            continue
        places = [("text of " + stage, done, stage)]
        places += [(f"{name} of {stage}", done.get(key, {}), stage) for key, name in WHOLE.items()]
        places.append((f"int8 weights of {stage}", done.get("int8", {}), stage))
        in_chat = done.get("chat", {}).get(stage, {})
        places += [(f"{task} of {stage}", in_chat, task) for task in in_chat]
        for name, entries, key in places:
            if entries.get(key, {}).get("model", there.fingerprint) != there.fingerprint:
                left_out.append((name, stage))
                del entries[key]
    return done, left_out


def line(result: TaskResult) -> str:
    """A result for the terminal."""
    low, high = result.interval
    counts = ", ".join(f"{key} {count}" for key, count in result.counts.items())
    found = result.numbers()
    rate = f"{result.rate:6.1%} {result.task.wanted:7} ({low:.1%} to {high:.1%}, n={result.n}; {counts})"
    more = [f"pass@{k} {one['rate']:.1%}" for k, one in found.get("pass", {}).items()]
    if found["cropped"]:
        more.append(f"{found['cropped']} questions cropped to the context")
    if "permuted" in found:
        permuted = found["permuted"]
        more.append(f"over all orders {permuted['rate']:.1%}, the same option in {permuted['steady']:.1%}")
    return " ".join([f"{result.task.name:18}", rate, *more])


def chatcore_line(run: Run, source: str) -> str:
    """Of all of a stage's results so far; "" where there is none."""
    core = (run.summary("eval") or {}).get("chatcore", {}).get(source)
    return f"ChatCORE {in_words(core)}" if core else ""


def say_failed(name: str, problem: Exception) -> None:
    """That a task has no result, and why."""
    if not isinstance(problem, UserError):
        traceback.print_exception(problem, file=sys.stderr)
    print(f"{name}: no result, the other tasks go on: {problem}", file=sys.stderr, flush=True)
