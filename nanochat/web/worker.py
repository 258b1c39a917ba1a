"""The thread in which the engine runs, and how answers come out of it.

The event loop never waits for the model: it hands a `Job` to a `Worker` and is called back, through its own loop, with
each event. The worker takes jobs in between steps, tells each step's tokens to their jobs, and drops what nobody waits
for any more. `Pool` spreads jobs over workers, one for each replica of the model.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from nanochat.chat import Event, Reply
from nanochat.engine import Request

RATE_SECONDS = 10.0  # over which tokens per second are counted


class Runs(Protocol):
    """What a worker needs of an engine: the real one's interface, or a stand-in's (mock.py)."""

    running: list[Request]
    slots: Any

    def submit(self, request: Request) -> Request: ...
    def cancel(self, request: Request) -> None: ...
    def retire(self) -> None: ...
    def step(self) -> list[tuple[Request, int]]: ...


class Full(Exception):
    """The queue is full: come back in `seconds`."""

    def __init__(self, seconds: int):
        super().__init__(f"{seconds}")
        self.seconds = seconds


@dataclass(eq=False)
class Job:
    """A request, what follows its answer, and who is told: tell(event), in the end tell(None) or tell(exception)."""

    request: Request
    reply: Reply
    tell: Callable[[Event | Exception | None], None]
    submitted: float = field(default_factory=time.perf_counter)
    first_token: float | None = None  # seconds after it was submitted

    @property
    def reason(self) -> str:
        """Why the answer ended: "stop", "length" or "cancelled"."""
        return "stop" if self.reply.stopped else self.request.ended or "cancelled"


class Worker:
    """An engine in a thread of its own. `on_end(job)` is called there when a job is over, however it ended."""

    def __init__(self, engine: Runs, on_end: Callable[[Job], None] = lambda job: None):
        self.engine, self.on_end = engine, on_end
        self.problem = ""  # why it is dead
        self.tokens = 0  # made since the start
        self._jobs: dict[Request, Job] = {}
        self._incoming: deque[Job] = deque()
        self._wake = threading.Condition()
        self._leaving = False
        self._recent: deque[tuple[float, int]] = deque()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def load(self) -> int:
        """Jobs that run or wait."""
        return len(self._jobs) + len(self._incoming)

    @property
    def running(self) -> int:
        return len(self.engine.running)

    def rate(self) -> float:
        """Tokens per second, lately."""
        now = time.perf_counter()
        return sum(count for when, count in list(self._recent) if now - when < RATE_SECONDS) / RATE_SECONDS

    def submit(self, job: Job) -> None:
        with self._wake:
            self._incoming.append(job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for this job any more; its slot is free within a step."""
        with self._wake:
            job.request.finished = True
            self._wake.notify()

    def close(self) -> None:
        """Ends the thread after the step it is in."""
        with self._wake:
            self._leaving = True
            self._wake.notify()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not self._leaving and not self._incoming and not self._jobs:
                        self._wake.wait()
                    if self._leaving:
                        return
                    fresh = list(self._incoming)
                    for job in fresh:
                        self._jobs[job.request] = job
                    self._incoming.clear()
                for job in fresh:
                    self.engine.submit(job.request)
                self._step()
        except Exception as problem:  # whatever the model or the card throws: everybody who waits is told
            self.problem = f"{type(problem).__name__}: {problem}".split("\n")[0]
            for job in [*self._jobs.values(), *self._incoming]:
                job.tell(RuntimeError(f"the engine stopped: {self.problem}"))
                self.on_end(job)
            self._jobs.clear()

    def _step(self) -> None:
        found = self.engine.step()
        now = time.perf_counter()
        self.tokens += len(found)
        self._recent.append((now, len(found)))
        while now - self._recent[0][0] > RATE_SECONDS:
            self._recent.popleft()
        for request, token in found:
            job = self._jobs.get(request)
            if job is None or (request.finished and not request.ended):
                continue
            if job.first_token is None:
                job.first_token = now - job.submitted
            for event in job.reply.feed(token):
                job.tell(event)
            if job.reply.stopped:
                self.engine.cancel(request)
        self.engine.retire()
        for request in [request for request in self._jobs if request.finished]:
            job = self._jobs.pop(request)
            for event in job.reply.finish():
                job.tell(event)
            job.tell(None)
            self.on_end(job)


class Pool:
    """Workers that share a bounded queue."""

    def __init__(self, workers: list[Worker], most: int):
        """most: jobs in all that run or wait."""
        self.workers, self.most = workers, most

    @property
    def load(self) -> int:
        return sum(worker.load for worker in self.workers)

    @property
    def problem(self) -> str:
        return next((worker.problem for worker in self.workers if worker.problem), "")

    def submit(self, jobs: list[Job]) -> Worker:
        """Hands jobs that belong together to the least busy worker. Raises Full."""
        if self.load + len(jobs) > self.most:
            raise Full(max(1, min(30, round(self.load / 10))))
        alive = [worker for worker in self.workers if not worker.problem]
        if not alive:
            raise RuntimeError(f"the engine stopped: {self.problem}")
        worker = min(alive, key=lambda worker: worker.load)
        for job in jobs:
            worker.submit(job)
        return worker

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


def stats(pool: Pool) -> dict[str, Any]:
    """What is going on, in numbers."""
    slots = sum(len(worker.engine.slots.lengths) for worker in pool.workers)
    running = sum(worker.running for worker in pool.workers)
    return dict(
        replicas=len(pool.workers),
        slots=slots,
        running=running,
        waiting=max(0, pool.load - running),
        most=pool.most,
        tokens=sum(worker.tokens for worker in pool.workers),
        tok_per_s=round(sum(worker.rate() for worker in pool.workers), 1),
    )
