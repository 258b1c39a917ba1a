"""The thread in which the engine runs, and how answers come out of it.

The event loop never waits for the model: it hands a `Job` to a `Worker` and is called back, through its own loop, with
each event. The worker takes jobs in between steps, tells each step's tokens to their jobs, and drops what nobody waits
for any more. `Pool` spreads jobs over workers, one for each replica of the model.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from kernels.dispatch import Lost
from nanochat.chat import Event, Reply
from nanochat.engine import Request

RATE_SECONDS = 10.0  # over which tokens per second are counted
WARMING = threading.Lock()  # one replica at a time: the second finds what the first has compiled


class Runs(Protocol):
    """What a worker needs of an engine: the real one's interface, or a stand-in's (mock.py)."""

    slots: Any

    @property
    def running(self) -> Sequence[Request]: ...

    @property
    def decoding(self) -> str: ...

    def warm(self) -> None: ...
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
    """A request, what follows its answer, and who gets it: emit(event), in the end emit(None) or emit(exception)."""

    request: Request
    reply: Reply
    emit: Callable[[Event | Exception | None], None]
    submitted: float = field(default_factory=time.perf_counter)
    first_token: float | None = None  # seconds after it was submitted
    failed: bool = False  # the engine died, or did not take it

    @property
    def reason(self) -> str:
        """Why the answer ended: "stop", "length", "cancelled" or "error"."""
        if self.failed:
            return "error"
        return "stop" if self.reply.stopped else self.request.ended or "cancelled"


class Worker:
    """An engine in a thread of its own, which first calls `begin()` (a GPU is chosen for each thread), then warms it.

    Jobs may come before it is warm, and wait. `on_end(job)` is called in that thread when a job is over, however it
    ended.
    """

    def __init__(
        self,
        engine: Runs,
        on_end: Callable[[Job], None] = lambda job: None,
        begin: Callable[[], None] = lambda: None,
    ):
        self.engine, self.on_end, self.begin = engine, on_end, begin
        self.problem = ""  # why it is dead
        self.ready = threading.Event()  # set when it is warm, or dead
        self.tokens = 0  # made since the start
        self._jobs: dict[Request, Job] = {}
        self._incoming: deque[Job] = deque()
        self._answered: deque[Job] = deque()  # whose tool has answered
        self._wake = threading.Condition()
        self._leaving = False
        self._recent: deque[tuple[float, int]] = deque()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def load(self) -> int:
        """Jobs that run or wait."""
        with self._wake:  # the thread moves them from one to the other
            return len(self._jobs) + len(self._incoming)

    @property
    def running(self) -> int:
        return 0 if self.problem else len(self.engine.running)

    def rate(self) -> float:
        """Tokens per second, lately."""
        now = time.perf_counter()
        return sum(count for when, count in list(self._recent) if now - when < RATE_SECONDS) / RATE_SECONDS

    def submit(self, jobs: list[Job]) -> bool:
        """Takes jobs in; False when it is dead, and then nobody will be told anything."""
        with self._wake:
            if not self.problem:
                self._incoming.extend(jobs)
                self._wake.notify()
            return not self.problem

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
            self.begin()
            with WARMING:
                self.engine.warm()
            self.ready.set()
            while self._take():
                self._step()
            why = "the server is shutting down"
        except (Exception, Lost) as problem:  # whatever the model or the card throws: everybody who waits is told
            why = f"{type(problem).__name__}: {problem}".split("\n")[0]
        with self._wake:
            self.problem = why
            abandoned = [*self._jobs.values(), *self._incoming]
            self._jobs.clear()
            self._incoming.clear()
        self.ready.set()
        for job in abandoned:
            self._fail(job, RuntimeError(f"the engine stopped: {why}"))

    def _fail(self, job: Job, problem: Exception) -> None:
        job.failed = True
        job.emit(problem)
        self.on_end(job)

    def _take(self) -> bool:
        """Gives new jobs to the engine, waiting for one when there is nothing to do; False: it is time to leave."""
        with self._wake:
            while not (self._leaving or self._incoming or self._answered or self._busy()):
                self._wake.wait()
            fresh = list(self._incoming)
            self._jobs.update((job.request, job) for job in fresh)
            self._incoming.clear()
            answered = [job for job in self._answered if not job.request.finished]
            self._answered.clear()
        for job in answered:
            job.reply.resume()
        for job in (*answered, *fresh):
            try:
                self.engine.submit(job.request)
            except ValueError as problem:  # of this request alone
                self._jobs.pop(job.request)
                self._fail(job, ValueError(f"the engine does not take this request: {problem}"))
        return not self._leaving

    def _busy(self) -> bool:
        """Is there anything to do, but to wait for tools?"""
        return any(request.finished or not request.paused for request in self._jobs)

    def _tool_answered(self, job: Job, _: object) -> None:
        """Called by a tool's thread."""
        with self._wake:
            self._answered.append(job)
            self._wake.notify()

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
                job.emit(event)
            if job.reply.pending:
                job.reply.pending.add_done_callback(partial(self._tool_answered, job))
            if job.reply.stopped:
                self.engine.cancel(request)
        over = [request for request in self._jobs if request.finished]  # before retire: who is cancelled after it
        self.engine.retire()  # keeps a slot, and so must keep the thread awake for one more step
        for request in over:
            job = self._jobs.pop(request)
            for event in job.reply.finish():
                job.emit(event)
            job.emit(None)
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
        """Of the first dead worker."""
        return next((worker.problem for worker in self.workers if worker.problem), "")

    @property
    def status(self) -> str:
        """ "ok", "degraded" when some workers are dead, "dead" when all are."""
        alive = sum(not worker.problem for worker in self.workers)
        return "ok" if alive == len(self.workers) else "degraded" if alive else "dead"

    def submit(self, jobs: list[Job]) -> Worker:
        """Hands jobs that belong together to the least busy worker. Raises Full; RuntimeError when all are dead."""
        if self.load + len(jobs) > self.most:
            raise Full(max(1, min(30, round(self.load / 10))))
        for worker in sorted(self.workers, key=lambda worker: worker.load):
            if worker.submit(jobs):
                return worker
        raise RuntimeError(f"the engine stopped: {self.problem}")

    def wait_until_ready(self) -> None:
        """Returns when every worker is warm or dead. Raises RuntimeError when all are dead."""
        for worker in self.workers:
            worker.ready.wait()
        if self.status == "dead":
            raise RuntimeError(self.problem)

    def drain(self, seconds: float) -> None:
        """Waits so long, at most, until nothing runs or waits."""
        ends = time.monotonic() + seconds
        while self.load and time.monotonic() < ends:
            time.sleep(0.05)

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


def stats(pool: Pool) -> dict[str, Any]:
    """What is going on, in numbers."""
    alive = [worker for worker in pool.workers if not worker.problem]
    slots = sum(len(worker.engine.slots.lengths) for worker in alive)
    running = sum(worker.running for worker in pool.workers)
    return dict(
        replicas=len(pool.workers),
        alive=len(alive),
        slots=slots,
        running=running,
        waiting=max(0, pool.load - running),
        most=pool.most,
        tokens=sum(worker.tokens for worker in pool.workers),
        tok_per_s=round(sum(worker.rate() for worker in pool.workers), 1),
        decoding=sorted({worker.engine.decoding for worker in alive}),
    )
