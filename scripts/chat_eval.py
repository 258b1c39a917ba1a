"""Asks a chat model the questions of the tasks and grades the answers; every wrong one is kept in a JSON-lines file."""

import json
import time
from dataclasses import dataclass

from nanochat import records
from nanochat.engine import Engine, Sampling
from nanochat.errors import UserError
from nanochat.evaluate.chat_tasks import evaluate
from nanochat.files import write_atomically
from nanochat.flags import flag, parse, run_script
from nanochat.hardware import setup as look_at_hardware
from nanochat.locks import turn
from nanochat.run import Run
from nanochat.tasks import MICROWORLD, TASKS


@dataclass
class Flags:
    run: str = flag("speedrun", "name of the run: its folder under $NANOCHAT_BASE_DIR/runs", "--model-tag", "-g")
    source: str = flag("sft", "stage whose model to ask: base | mid | sft", "-i")
    tasks: str = flag("all", f"comma-separated: {', '.join(TASKS)}", "-a", "--task-name")
    max_problems: int = flag(500, "questions per task, at most", "-x")
    batch_size: int = flag(64, "questions answered at a time", "-b")
    temperature: float = flag(0.0, "0: greedy", "-t")
    top_k: int = flag(50, "candidates to draw from when the temperature is not 0", "-k")
    max_new_tokens: int = flag(64, "longest answer, in tokens", "-m")
    device_type: str = flag("", "cuda | cpu | mps (default: the best there is)")
    profile: int = flag(0, "record so many steps of the engine, once it is warm, to <run>/eval/profile/ (0: none)")


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    from profiling.record import engine_recorder

    names = list(MICROWORLD) if flags.tasks == "all" else flags.tasks.split(",")
    for name in names:
        if name not in TASKS:
            raise UserError(f"--tasks names {name!r}; the tasks are {', '.join(TASKS)}")
    hardware = look_at_hardware(flags.device_type)
    run = Run.open(flags.run)
    run.summary("eval")  # a damaged one is an error before the work
    path = run.stage("eval") / f"{flags.source}_failures.jsonl"
    remedy = "delete it and evaluate again"
    records.rows(path, remedy)
    found = run.checkpoint(flags.source)
    tokenizer = run.tokenizer()
    found.check_tokenizer(tokenizer)
    engine = Engine(found.model(hardware.device, hardware.dtype), slots=flags.batch_size)
    more = "ask more (--max-problems, --max-new-tokens), or fewer at a time (--batch-size)"
    recorder = engine_recorder(engine, flags.profile, "chat_eval", run.stage("eval"), hardware, more)
    sampling = Sampling(flags.temperature, flags.top_k or None)
    results, failures = {}, []
    for name in names:
        started = time.perf_counter()
        result = evaluate(engine, tokenizer, TASKS[name], flags.max_problems, flags.max_new_tokens, sampling)
        low, high = result.interval
        counts = ", ".join(f"{key} {count}" for key, count in result.counts.items())
        print(
            f"{flags.source} {name:18} {result.rate:6.1%} {result.wanted:7} ({low:.1%} to {high:.1%}, n={result.n}; "
            f"{counts}) {time.perf_counter() - started:.1f} s",
            flush=True,
        )
        results[name] = dict(result.numbers(), model=found.fingerprint)
        failures += [dict(task=name, **example) for example in result.examples if example["outcome"] != result.wanted]
    with turn(run.stage("eval") / ".lock"):  # another stage, or other tasks, may be evaluated at the same time
        others = [row for row in records.rows(path, remedy) if row.get("task") not in names]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in others + failures).encode())
        everything = run.summary("eval") or {}
        chat = everything.get("chat", {})
        tasks = {**chat.get(flags.source, {}), **results}
        run.write_summary("eval", {**everything, "chat": {**chat, flags.source: tasks}})
    print(f"{len(failures)} failing examples in {path}")
    if recorder:
        recorder.end()


if __name__ == "__main__":
    run_script(main)
