"""Serve a trained model: a chat page, and an API that OpenAI's clients speak (http://127.0.0.1:8000/v1)."""

import asyncio
import socket
import time
from dataclasses import dataclass

import torch
import uvicorn

from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.flags import flag, parse, run_script
from nanochat.hardware import setup as look_at_hardware
from nanochat.run import Run
from nanochat.tokenizer import Tokenizer
from nanochat.web import metrics, mock
from nanochat.web.app import Served, make_app
from nanochat.web.limits import Limits, guarded_protocol
from nanochat.web.worker import Pool, Worker


@dataclass
class Flags:
    run: str = flag("speedrun", "name of the run: its folder under $NANOCHAT_BASE_DIR/runs", "--model-tag", "-g")
    source: str = flag("", "stage whose model to serve: base | mid | sft (default: the last there is)", "-i")
    step: int = flag(-1, "serve the checkpoint of this step (-1: the newest)", "-s")
    temperature: float = flag(0.8, "where a request does not say", "-t")
    top_k: int = flag(50, "candidates to draw from, where a request does not say (0: all)", "-k")
    max_tokens: int = flag(512, "longest answer, where a request does not say", "-m")
    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in")
    port: int = flag(8000, "port to listen on", "-p")
    num_gpus: int = flag(1, "replicas of the model, one for each GPU", "-n")
    device_type: str = flag("", "cuda | cpu | mps (default: the best there is)")
    slots: int = flag(32, "answers that a replica writes at the same time")
    max_waiting: int = flag(256, "answers that may run or wait in all; more get 429")
    api_key: str = flag("", "clients must send this key (default: none is asked for)")
    mock: bool = flag(False, "serve a parrot with prepared answers, to try the page without training")


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    for name, least, most in (("port", 1, 65535), ("num_gpus", 1, 64), ("slots", 1, 4096), ("max_tokens", 1, 1 << 20)):
        if not least <= getattr(flags, name) <= most:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(flags, name)}, wanted {least} to {most}")
    if not 0 <= flags.temperature <= 2 or flags.top_k < 0 or flags.max_waiting < 1:
        raise UserError("--temperature wants 0 to 2, --top-k 0 or more, --max-waiting 1 or more")
    listening = listen(flags.host, flags.port)
    hardware = look_at_hardware(flags.device_type)
    if hardware.device.type == "cuda" and flags.num_gpus > torch.cuda.device_count():
        raise UserError(f"--num-gpus is {flags.num_gpus}, but there are {torch.cuda.device_count()}")
    if hardware.device.type != "cuda" and flags.num_gpus > 1:
        raise UserError(f"--num-gpus is {flags.num_gpus}, but this is {hardware.device.type}: one replica")
    cuda = hardware.device.type == "cuda"
    devices = [torch.device("cuda", i) for i in range(flags.num_gpus)] if cuda else [hardware.device]
    engines: list[Engine | mock.Parrot]
    if flags.mock:
        tokenizer, stage, name = mock.tokenizer(), "mock", "mock"
        engines = [mock.Parrot(tokenizer, flags.slots)]
    else:
        models, tokenizer, stage = load(flags, devices, hardware.dtype)
        name = f"{flags.run}-{stage}"
        engines = [Engine(model, flags.slots) for model in models]
    pool = Pool([Worker(engine, metrics.ended) for engine in engines], flags.max_waiting)
    served = Served(
        pool, tokenizer, name, engines[0].config.sequence_len, stage, flags.temperature, flags.top_k,
        min(flags.max_tokens, engines[0].config.sequence_len), int(time.time()),
    )  # fmt: skip
    serve(flags, served, listening)


def load(flags: Flags, devices: list, dtype: torch.dtype) -> tuple[list, Tokenizer, str]:
    """A model for each device, the run's tokenizer, and the stage's name."""
    run = Run.open(flags.run)
    found = run.checkpoint(flags.source or None, flags.step if flags.step >= 0 else None)
    tokenizer = run.tokenizer()
    found.check_tokenizer(tokenizer)
    return [found.model(device, dtype) for device in devices], tokenizer, found.meta["stage"]


def listen(host: str, port: int) -> socket.socket:
    """The socket, bound before anything is loaded. Raises UserError when port or address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as problem:
        raise UserError(f"cannot listen on {host}:{port}: {problem.strerror or problem}; try another --port") from None
    return listening


def serve(flags: Flags, served: Served, listening: socket.socket) -> None:
    """Runs until SIGINT or SIGTERM; answers that are being written are finished first."""
    everywhere = flags.host in ("0.0.0.0", "::")
    hosts = frozenset() if everywhere else frozenset({flags.host, "localhost", "127.0.0.1", "::1"})
    limits = Limits(hosts, flags.api_key)
    config = uvicorn.Config(
        make_app(served, limits), http=guarded_protocol(limits), log_level="warning", timeout_graceful_shutdown=30,
        timeout_keep_alive=15, h11_max_incomplete_event_size=32 << 10, server_header=False, ws="none",
    )  # fmt: skip
    where = f"http://{'localhost' if everywhere else flags.host}:{flags.port}"
    print(f"Serving {served.model}: {where}/ (page), {where}/v1 (API). Ctrl-C ends.", flush=True)
    if everywhere and not flags.api_key:
        print("note: anybody who reaches this machine can use it; --api-key asks for a key", flush=True)
    asyncio.run(uvicorn.Server(config).serve(sockets=[listening]))


if __name__ == "__main__":
    run_script(main)
