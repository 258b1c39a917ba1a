"""Serves a model of random weights and reads streams from it: how many at once a line in, a JSON line out.

Called by benchmarks/neighbour.py; the server is a process of its own, `scripts.chat_web` as a user starts it. It ends
with the input.
"""

import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[0] = sys.argv[1]  # not this file's own folder

from benchmarks import load, worker  # noqa: E402
from nanochat import threads  # noqa: E402

settings = json.loads(sys.argv[2])
if not any(name in os.environ for name in threads.VARIABLES):  # then scripts would set theirs
    os.environ["KMP_LIBRARY"] = "throughput"  # libiomp's own default; libgomp does not read it


def measure(server: load.Server, clients: int) -> dict[str, Any]:
    """Tokens per second of so many answers that are streamed at once."""

    async def read() -> float:
        started, before = time.perf_counter(), await load.tokens(server)
        answers = [load.ask(server, i, settings["new_tokens"]) for i in range(clients)]
        await asyncio.gather(*answers)
        return (await load.tokens(server) - before) / (time.perf_counter() - started)

    return dict(tok_per_s=asyncio.run(read()))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = load.random_run(Path(folder), worker.sizes(settings))
        server = load.Server(run, NANOCHAT_BASE_DIR=folder)
        try:
            asyncio.run(server.ready())
            about = f"{settings['batch']} streams at once"
            worker.serve(sys.argv[1], lambda: (server, about), lambda: (server, about), measure)
        finally:
            server.end()


if __name__ == "__main__":
    main()
