"""Serve a trained model: a chat page, and an API that OpenAI's clients speak (http://127.0.0.1:8000/v1)."""

import gc
import sys
import time
from dataclasses import dataclass
from functools import partial

import torch

from nanochat import chat, drivers
from nanochat.engine import Engine, background, weights
from nanochat.errors import UserError
from nanochat.flags import MANY, fail, flag, number, parse, run_script
from nanochat.hardware import compute_dtype
from nanochat.hardware import setup as look_at_hardware
from nanochat.run import Run
from nanochat.sandbox import tool as tools

try:
    from nanochat.web import metrics, mock, suggestions
    from nanochat.web.app import make_app
    from nanochat.web.limits import EVERYWHERE, Limits, called, checked_origin
    from nanochat.web.served import Served
    from nanochat.web.server import Door, address, listen, listening, until_told_to_end
    from nanochat.web.worker import Pool, Worker
except Exception as problem:  # missing, or of versions that do not fit each other, which raise whatever comes first
    wanted = "pip install -U fastapi uvicorn prometheus-client, or use scripts.chat_cli"
    sys.exit(fail(f"the server's packages cannot be imported ({problem}): {wanted}"))

DRAIN_SECONDS = 30.0  # so long answers may still be written after the server was told to end


@dataclass
class Flags:
    run: str = flag("speedrun", "name of the run: its folder under $NANOCHAT_BASE_DIR/runs", "--model-tag", "-g")
    source: str = flag("", "stage whose model to serve: base | mid | sft | rl (default: the last there is)", "-i")
    step: int = number(-1, 0, MANY, "serve the checkpoint of this step (-1: the newest)", "-s")
    temperature: float = number(0.8, 0.0, 2.0, "where a request does not say", "-t")
    top_k: int = number(50, 0, 1 << 20, "candidates to draw from, where a request does not say (0: all)", "-k")
    max_tokens: int = number(512, 1, 1 << 20, "longest answer, where a request does not say", "-m")
    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in")
    port: int = number(8000, 1, 65535, "port to listen on", "-p")
    num_gpus: int = number(1, 1, 64, "replicas of the model, one for each GPU", "-n")
    device_type: str = flag("", "cuda | cpu | mps (default: the best there is)")
    weights: str = flag("", weights.HELP)
    slots: int = number(32, 1, 4096, "answers that a replica writes at the same time")
    max_waiting: int = number(256, 1, MANY, "answers that may run or wait in all; more get 429")
    api_key: str = flag("", "clients must send this key (default: none is asked for)")
    allow_host: str = flag("", "other names the server is called by (host.docker.internal, a proxy's), comma-separated")
    allow_origin: str = flag("", "one other page whose scripts may ask (CORS), such as https://example.org")
    python_tool: bool = flag(False, tools.HELP)
    allow_unsandboxed: bool = flag(False, tools.HELP_UNSANDBOXED)
    mock: bool = flag(False, "serve a parrot with prepared answers, to try the page without training")


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    everywhere = flags.host in EVERYWHERE
    limits = Limits(called(flags.host, flags.allow_host), flags.api_key, checked_origin(flags.allow_origin))
    tool, door = tools.chosen(flags), Door()
    with listen(flags.host, flags.port) as at, listening(door, limits, at) as thread:
        served = load(flags, tool)
        enter(door, served, limits)
        where = f"http://{'localhost' if everywhere else address(flags.host)}:{flags.port}"
        print(f"Serving {served.model}: {where}/ (page), {where}/v1 (API). Ctrl-C ends.", flush=True)
        if everywhere and not flags.api_key:
            print("note: anybody who reaches this machine can use it; --api-key asks for a key", flush=True)
        until_told_to_end(thread)
        door.closed = "draining"
        served.pool.drain(DRAIN_SECONDS)
    served.pool.close()


def enter(door: Door, served: Served, limits: Limits) -> None:
    """Opens the door when every replica is warm or dead; until then /health says loading. Raises UserError when all
    are dead."""
    if served.pool.workers[0].engine.decoding == "graphs":
        print("Compiling kernels and capturing graphs; the first time takes a minute or more.", flush=True)
    try:
        served.pool.wait_until_ready()
    except RuntimeError as problem:
        raise UserError(f"no replica could be started: {problem}; fewer --slots need less memory") from None
    if served.pool.problem:
        print(f"note: a replica is dead, the others serve: {served.pool.problem}", flush=True)
    app = make_app(served, limits)
    gc.collect()  # what is there now stays: the collector need not stop everything for 0.3 s to find that out
    gc.freeze()
    door.open(app)


def load(flags: Flags, tool: chat.Tool) -> Served:
    """The model on every device, and what belongs to it. Raises UserError when it cannot be had."""
    hardware = look_at_hardware(flags.device_type)
    weights.check(flags.weights, hardware.device)
    cuda = hardware.device.type == "cuda"
    if cuda and flags.num_gpus > torch.cuda.device_count():
        raise UserError(f"--num-gpus is {flags.num_gpus}, but there are {torch.cuda.device_count()}")
    if not cuda and flags.num_gpus > 1:
        raise UserError(f"--num-gpus is {flags.num_gpus}, but this is {hardware.device.type}: one replica")
    devices = [torch.device("cuda", i) for i in range(flags.num_gpus)] if cuda else [hardware.device]
    for device in devices[1:]:  # the first was looked at
        if problem := drivers.unsupported(device.index)[0]:
            raise UserError(f"--num-gpus is {flags.num_gpus}, but {problem}")
    engines: list[Engine | mock.Parrot]
    if flags.mock:
        tokenizer, stage, about, report = mock.tokenizer(), "mock", {}, None
        engines = [mock.Parrot(tokenizer, flags.slots) for _ in devices]
    else:
        run = Run.open(flags.run)
        found = run.checkpoint(flags.source or None, flags.step if flags.step >= 0 else None, older=True)
        tokenizer, stage = run.tokenizer(), found.meta["stage"]
        about, report = suggestions.of_the_run(run, stage), run.folder / "report.html"
        found.check_tokenizer(tokenizer)
        dtypes = [compute_dtype(device)[0] for device in devices]  # cards may differ
        models = (found.model(device, dtype, dtype) for device, dtype in zip(devices, dtypes))
        engines = [engine := Engine(model, flags.slots, flags.weights) for model in models]
        if hardware.device.type == "cpu":  # compiled beside the first answers, and then taken over
            background.compile_decoding(engine)
    begin = [partial(torch.cuda.set_device, device) if cuda else (lambda: None) for device in devices]
    pool = Pool([Worker(engine, metrics.ended, b) for engine, b in zip(engines, begin)], flags.max_waiting)
    context, name = engines[0].config.sequence_len, "mock" if flags.mock else f"{flags.run}-{stage}"
    return Served(
        pool, tokenizer, name, context, stage, flags.temperature, flags.top_k, min(flags.max_tokens, context),
        int(time.time()), tool, about, report,
    )  # fmt: skip


if __name__ == "__main__":
    background.end_at_once(partial(run_script, main, goes_on=True))
