"""Long runs of small things: memory, objects, file descriptors and threads stay what they are."""

import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import tiny
from test_training import home  # noqa: F401 (home is a fixture)
from test_web import say, serving, wait_until

from nanochat import checkpoint, trainer
from nanochat.data.packing import Document
from nanochat.engine import Engine
from nanochat.run import Run

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc here")
MB = 1 << 20
OBJECTS = 300  # that Python may have more: what the last steps or answers have not let go of


@dataclass
class Use:
    """What this process takes. memory: bytes of the resident set; objects: those that the collector tracks, without
    the documents that wait in the loader (and the tuples they lie in), of which there are now 1,000 and now 3,000.
    """

    memory: int
    objects: int
    files: int
    threads: int

    @classmethod
    def now(cls) -> "Use":
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files = len(os.listdir("/proc/self/fd"))
        objects = sum(type(one) not in (Document, tuple) for one in gc.get_objects())
        return cls(pages * os.sysconf("SC_PAGE_SIZE"), objects, files, threading.active_count())


def assert_flat(uses: list[Use], growth: int) -> None:
    """The first quarter is for warming up; a peak afterwards counts as much as a slope. growth: bytes that the resident
    set may have more at the end, since the allocator keeps fragments.
    """
    print("\n".join(map(str, uses)))
    warm, rest = uses[len(uses) // 4], uses[len(uses) // 4 + 1 :]
    assert max(use.memory for use in rest) < warm.memory + growth
    assert max(use.objects for use in rest) < warm.objects + OBJECTS
    assert max(use.files for use in rest) <= warm.files
    assert max(use.threads for use in rest) <= warm.threads


def test_a_leak_is_seen():
    flat = [Use(1 << 30, 1000, 10, 5)] * 8
    assert_flat(flat, 8 * MB)
    for more in (Use(3 << 29, 1000, 10, 5), Use(1 << 30, 2000, 10, 5), Use(1 << 30, 1000, 11, 5), Use(1, 1, 1, 6)):
        with pytest.raises(AssertionError):
            assert_flat([*flat, more], 8 * MB)


def soak_training(home, monkeypatch, steps):  # noqa: F811
    uses, plain = [], trainer._account

    def watched(stage, *args):
        plain(stage, *args)
        if stage.state.step % (steps // 20) == steps // 40:  # nothing is saved or evaluated at these steps
            stage.saver.wait()
            uses.append(Use.now())

    monkeypatch.setattr(trainer, "_account", watched)
    sizes = (
        "--depth=1 --aspect-ratio=16 --head-dim=16 --max-seq-len=16 --device-batch-size=1 --total-batch-size=16 "
        f"--num-iterations={steps} --save-every={steps // 100} --eval-every={steps // 20} --eval-tokens=64 "
        f"--sample-every={steps // 10} --compile=no"
    )
    assert tiny.call("base_train", "--run=a", f"--data={home / 'text.jsonl'}", *sizes.split()) == 0
    assert checkpoint.latest(Run.open("a").stage("base")).step == steps and len(uses) == 20
    return uses


@pytest.mark.slow
def test_twenty_thousand_steps(home, monkeypatch):  # noqa: F811
    """With a hundred checkpoints, twenty validations and ten rounds of samples."""
    assert_flat(soak_training(home, monkeypatch, 20_000), 4 * MB)


def ask(url, number):
    """One client: streams, takes all at once, leaves in the middle, or sends what is refused."""
    body = dict(messages=say(f"word {number}"), max_tokens=8, stream=number % 4 != 1)
    if number % 4 == 3:
        body["temperature"] = "hot"
    with httpx.stream("POST", url + "/v1/chat/completions", json=body, timeout=30) as answer:
        assert answer.status_code == (400 if number % 4 == 3 else 200)
        for _ in answer.iter_raw():
            if number % 4 == 2:
                break


def soak_server(requests):
    uses = []
    with serving(Engine(tiny.model(), slots=4), tiny.tokenizer(), 64) as (url, pool):
        for block in range(20):
            numbers = range(block * requests // 20, (block + 1) * requests // 20)
            with ThreadPoolExecutor(4) as clients:
                list(clients.map(lambda number: ask(url, number), numbers))
            assert wait_until(lambda: pool.load == 0)
            wait_until(lambda: uses and Use.now().files <= uses[0].files)  # connections are closed
            uses.append(Use.now())
    return uses


@pytest.mark.slow
def test_two_thousand_requests():
    """A quarter each are streamed, answered at once, left in the middle, and refused."""
    assert_flat(soak_server(2_000), 16 * MB)
