"""Asks a chat model the questions of the tasks and grades the answers; every wrong one is kept in a JSON-lines file."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from nanochat import sandbox
from nanochat.consensus import same_checkpoint
from nanochat.engine import Engine, Sampling
from nanochat.errors import UserError
from nanochat.evaluate import results, view
from nanochat.evaluate.askers import How, of_model, of_server
from nanochat.evaluate.chat_tasks import chosen, evaluate
from nanochat.evaluate.server import Server
from nanochat.flags import MANY, SEEDS, flag, number, parse, run_script
from nanochat.hardware import Hardware
from nanochat.hardware import setup as look_at_hardware
from nanochat.run import Run
from nanochat.sandbox import tool as tools
from nanochat.tasks import TASKS, Task
from nanochat.tasks.humaneval import passes


@dataclass
class Flags:
    run: str = flag("speedrun", "name of the run: its folder under $NANOCHAT_BASE_DIR/runs", "--model-tag", "-g")
    source: str = flag("sft", "stage whose model to ask: base | mid | sft | rl", "-i")
    tasks: str = flag(
        "", f"comma-separated: {', '.join(TASKS)}; all (default: those it was trained for)", "-a", "--task-name"
    )
    max_problems: int = number(500, 0, MANY, "questions per task, at most (0: all)", "-x")
    batch_size: int = number(64, 1, 4096, "answers written at a time", "-b")
    num_samples: int = number(1, 1, 10_000, "answers to each question that is answered by writing: gives pass@k", "-n")
    temperature: float = number(0.0, 0.0, 2.0, "0: greedy", "-t")
    top_k: int = number(50, 0, 1 << 20, "candidates to draw from when the temperature is not 0", "-k")
    seed: int = number(42, *SEEDS, "of the draws")
    max_new_tokens: int = number(0, 0, 1 << 20, "longest answer, in tokens (0: what each task allows)", "-m")
    permute: bool = flag(False, "ask multiple choice with every cyclic shift of the options: shows letter bias")
    python_tool: bool = flag(False, tools.HELP)
    allow_unsandboxed: bool = flag(False, "where what a model wrote cannot be isolated: run it, with your rights")
    view: bool = flag(False, "ask nothing: page through the failing examples of the last evaluation")
    server: str = flag("", "ask a model behind this OpenAI-compatible server instead, as http://127.0.0.1:8000/v1")
    model: str = flag("", "the model's name there")
    api_key_env: str = flag("", "the environment variable that has the server's key (default: no key is sent)")
    device_type: str = flag("", "cuda | cpu | mps (default: the best there is)")
    profile: int = number(0, 0, 10_000, "record so many warm steps of the engine to <run>/eval/profile/ (0: none)")


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    if flags.num_samples > 1 and not flags.temperature:
        raise UserError("--num-samples of more than 1 wants a --temperature")
    if flags.python_tool and flags.server:
        raise UserError("--python-tool is for a run's model: a server has tools of its own")
    run, source = (Run.served(flags.model), "server") if flags.server else (Run.open(flags.run), flags.source)
    run.summary("eval")  # a damaged one is an error before the work
    failing = results.failures(run, source)
    if flags.view:
        if not results.failures_file(run, source).exists():
            raise UserError(f"nothing of {source} of {run.name!r} has been evaluated yet: call it without --view first")
        wanted = chosen(flags.tasks, "")[0] if flags.tasks else None
        rows = [row for row in failing if wanted is None or row.get("task") in wanted]
        return view.page(rows, input if sys.stdin.isatty() else None)
    hardware = look_at_hardware(flags.device_type)
    sampling = Sampling(flags.temperature, flags.top_k or None, flags.seed)
    tool = tools.chosen(flags)
    how = How(sampling, tool, flags.num_samples, flags.max_new_tokens, flags.permute, hardware.is_main)
    settings = dict(temperature=flags.temperature, top_k=flags.top_k, seed=flags.seed, samples=flags.num_samples)
    end: Callable[[], None] = lambda: None
    if flags.server:
        ask, data, weights = of_server(server(flags), how), "", ""
    else:
        found = same_checkpoint(lambda: run.checkpoint(source))
        tokenizer, data, weights = run.tokenizer(), found.meta.get("data", ""), found.fingerprint
        found.check_tokenizer(tokenizer)
        model = found.model(hardware.device, hardware.dtype, hardware.dtype)
        ask, engine = of_model(model, tokenizer, flags.batch_size, how)
        if flags.profile and hardware.is_main:
            end = recording(flags, engine(), run, hardware)
    names, named = chosen(flags.tasks, data)
    if hardware.is_main:
        results.check_place(run)
    failed = done = failures = 0
    for name in names:
        started = time.perf_counter()
        try:
            result = evaluate(task(name, flags, hardware), flags.max_problems, ask, hardware)
        except Exception as problem:  # the other tasks go on; data that is not there fails only who asked for it
            failed += named or not isinstance(problem, UserError)
            if hardware.is_main:
                results.say_failed(name, problem)
            continue
        done, failures = done + 1, failures + len(result.failures)
        if hardware.is_main:
            results.keep(run, source, result, settings, weights)
            print(f"{source} {results.line(result)} {time.perf_counter() - started:.1f} s", flush=True)
    if hardware.is_main and done:
        if core := results.chatcore_line(run, source):
            print(f"{source} {core}")
        print(f"{failures} failing examples in {results.failures_file(run, source)} (--view pages through them)")
    end()
    if failed or not done:
        sys.exit(1)


def task(name: str, flags: Flags, hardware: Hardware) -> Task:
    """Raises UserError for HumanEval, which runs what a model wrote, where it cannot be isolated and is not allowed."""
    if name != "humaneval":
        return TASKS[name]
    isolation = sandbox.require(flags.allow_unsandboxed)
    if hardware.is_main:
        print(f"Programs that are written for HumanEval run with: {isolation}.", flush=True)
    return replace(TASKS[name], is_right=partial(passes, unsandboxed=flags.allow_unsandboxed))


def server(flags: Flags) -> Server:
    """Raises UserError where there is none."""
    if not flags.model:
        raise UserError("--server wants --model too: its name there")
    if flags.api_key_env and not os.environ.get(flags.api_key_env):
        raise UserError(f"--api-key-env names {flags.api_key_env}, which is not set")
    made = Server(flags.server, flags.model, os.environ.get(flags.api_key_env, ""), flags.batch_size)
    made.check()
    return made


def recording(flags: Flags, engine: Engine, run: Run, hardware: Hardware) -> Callable[[], None]:
    """Begins to record the engine's steps; returns what is to be called at the end."""
    from profiling.recorded.record import engine_recorder

    more = "ask more (--max-problems, --max-new-tokens), or fewer at a time (--batch-size)"
    recorder = engine_recorder(engine, flags.profile, "chat_eval", run.stage("eval"), hardware, more)
    return recorder.end if recorder else lambda: None


if __name__ == "__main__":
    run_script(main, goes_on=True)
