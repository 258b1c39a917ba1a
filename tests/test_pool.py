"""Several replicas behind one queue: jobs are spread, a dead replica is nobody else's trouble, numbers add up."""

import gc
import socket
import sys
import threading
from contextlib import contextmanager

import httpx
import pytest
import tiny
from test_web import HOSTS, client, say, serving, wait_until

from kernels.dispatch import Lost
from nanochat import chat
from nanochat.chat import Reply
from nanochat.engine import Engine, Request, Sampling, background
from nanochat.errors import UserError
from nanochat.web import metrics, mock
from nanochat.web.limits import Limits
from nanochat.web.served import Served
from nanochat.web.server import Door, listening
from nanochat.web.worker import Full, Job, Pool, Worker, stats
from scripts import chat_web

TOKENIZER = tiny.tokenizer()


class Listener:
    """A job that says these words, and what its owner was told."""

    def __init__(self, words="the dog", seed=1, max_tokens=400):
        prompt = TOKENIZER.render_for_completion(say(words))
        self.events = []
        request = Request(prompt, max_tokens, Sampling(1.0, 50, seed), chat.ends(TOKENIZER))
        self.job = Job(request, Reply(TOKENIZER, request), self.events.append)

    @property
    def over(self):
        return bool(self.events) and (self.events[-1] is None or isinstance(self.events[-1], Exception))

    @property
    def text(self):
        return chat.visible_text([event for event in self.events if event is not None])


class Dying(mock.Parrot):
    """Falls off when it is told to."""

    def __init__(self, slots=4):
        super().__init__(TOKENIZER, slots)
        self.falls = threading.Event()

    def step(self):
        if self.falls.is_set():
            raise RuntimeError("the card fell off")
        return super().step()


@pytest.fixture
def pool():
    made = Pool([Worker(Dying(), metrics.ended) for _ in range(3)], most=24)
    yield made
    made.close()


def submit(pool, *listeners):
    return [pool.submit([one.job]) for one in listeners]


def test_jobs_are_spread_evenly_and_all_answered(pool):
    listeners = [Listener(f"number {i}") for i in range(12)]
    workers = submit(pool, *listeners)
    assert [workers.count(worker) for worker in pool.workers] == [4, 4, 4]
    assert wait_until(lambda: all(one.over for one in listeners), 10)
    assert [one.text for one in listeners] == [f"number {i}" for i in range(12)]


def test_jobs_that_belong_together_stay_together_and_full_is_full(pool):
    together = [Listener() for _ in range(20)]
    worker = pool.submit([one.job for one in together])
    assert worker.load == 20 == pool.load
    with pytest.raises(Full):
        pool.submit([Listener().job for _ in range(5)])
    assert submit(pool, Listener())[0] is not worker


def test_a_dead_replica_leaves_the_others_alone(pool):
    listeners = [Listener("word " * 20) for _ in range(6)]
    workers = submit(pool, *listeners)
    dead = pool.workers[1]
    dead.engine.falls.set()
    assert wait_until(lambda: all(one.over for one in listeners), 10)
    for one, worker in zip(listeners, workers):
        if worker is dead:
            assert str(one.events[-1]) == "the engine stopped: RuntimeError: the card fell off"
            assert one.job.reason == "error"
        else:
            assert one.text == "word " * 20 and one.job.reason == "stop"
    assert pool.status == "degraded" and dead.load == dead.running == 0
    more = [Listener() for _ in range(4)]
    assert dead not in submit(pool, *more)
    assert wait_until(lambda: all(one.over for one in more), 10)
    assert stats(pool)["alive"] == 2 and stats(pool)["slots"] == 8 and stats(pool)["running"] == 0
    for worker in pool.workers:
        worker.engine.falls.set()
    submit(pool, Listener(), Listener())
    assert wait_until(lambda: pool.status == "dead")
    with pytest.raises(RuntimeError, match="the card fell off"):
        submit(pool, Listener())


def test_a_request_that_the_engine_does_not_take_is_its_own_trouble():
    worker = Worker(Engine(tiny.model(), 2))
    long, short = Listener(), Listener(max_tokens=2)
    long.job.request.prompt = [0] * 64
    worker.submit([long.job, short.job])
    wait_until(lambda: long.over and short.over)
    assert long.job.reason == "error" and "the prompt has 64 tokens, wanted 1 to 63" in str(long.events[-1])
    assert short.events[-1] is None and not worker.problem and worker.load == 0
    worker.close()


@pytest.mark.parametrize("end", [RuntimeError, Lost])
def test_nobody_waits_for_ever_who_comes_while_it_dies(end):
    """The worker is in its last step when the second job comes; a third comes after its end."""
    inside, go = threading.Event(), threading.Event()

    class Blocked(mock.Parrot):
        def step(self):
            inside.set()
            go.wait(5)
            raise end("gone")

    worker = Worker(Blocked(TOKENIZER, 2))
    first, second, third = Listener(), Listener(), Listener()
    assert worker.submit([first.job])
    assert inside.wait(5) and worker.submit([second.job])
    go.set()
    assert wait_until(lambda: first.over and second.over)
    assert not worker.submit([third.job]) and worker.load == 0


def test_closing_tells_those_who_still_wait():
    worker = Worker(mock.Parrot(TOKENIZER, 1))
    listeners = Listener("word " * 40), Listener()
    worker.submit([one.job for one in listeners])
    worker.close()
    assert all(isinstance(one.events[-1], RuntimeError) for one in listeners)
    assert not worker.submit([Listener().job])


def test_begin_is_called_in_the_thread_and_its_failure_is_told():
    where = []
    worker = Worker(mock.Parrot(TOKENIZER, 1), begin=lambda: where.append(threading.current_thread().name))
    assert wait_until(lambda: where == ["engine"])
    worker.close()

    def no_card():
        raise RuntimeError("no such card")

    failed = Worker(mock.Parrot(TOKENIZER, 1), begin=no_card)
    assert wait_until(lambda: failed.problem == "RuntimeError: no such card")


def test_cancelling_reaches_the_right_replica(pool):
    listeners = [Listener("word " * 30) for _ in range(3)]
    workers = submit(pool, *listeners)
    assert wait_until(lambda: all(one.events for one in listeners))
    workers[1].cancel(listeners[1].job)
    assert wait_until(lambda: [worker.running for worker in workers] == [1, 0, 1], 1)
    assert listeners[1].over and listeners[1].job.reason == "cancelled" and listeners[1].text != "word " * 30
    assert wait_until(lambda: listeners[0].over and listeners[2].over, 10)
    assert listeners[0].text == listeners[2].text == "word " * 30


def test_a_client_that_leaves_at_any_moment_gives_its_slot_back():
    """Cancelled just after a step's finished rows were retired: the thread must not fall asleep with a row taken."""
    listeners = Listener("word " * 20)

    class Left(mock.Parrot):
        def retire(self):
            super().retire()
            if len(listeners.job.request.output) == 3:
                listeners.job.request.finished = True

    worker = Worker(Left(TOKENIZER, 2))
    worker.submit([listeners.job])
    assert wait_until(lambda: listeners.over) and wait_until(lambda: worker.running == 0, 1)
    worker.close()


def test_numbers_are_those_of_all_replicas(pool):
    def made():
        found = [sample for m in (*metrics.MADE.collect(), *metrics.FINISHED.collect()) for sample in m.samples]
        return sum(sample.value for sample in found if sample.name.endswith("_total"))

    before = made()
    listeners = [Listener(f"number {i} " * 8) for i in range(6)]
    submit(pool, *listeners)
    assert wait_until(lambda: stats(pool)["running"] == 6)
    assert stats(pool)["slots"] == 12 and stats(pool)["replicas"] == 3
    assert wait_until(lambda: all(one.over for one in listeners), 10)
    tokens = sum(len(one.job.request.output) for one in listeners)
    assert stats(pool)["tokens"] == tokens and made() - before == tokens + 6
    assert stats(pool)["tok_per_s"] == pytest.approx(tokens / 10, abs=0.1)


class Cold(mock.Parrot):
    """Is warm when it is told to be, or dies of it."""

    def __init__(self, problem=""):
        super().__init__(TOKENIZER, 4)
        self.goes, self.problem, self.inside = threading.Event(), problem, threading.Event()

    def warm(self):
        self.inside.set()
        self.goes.wait(10)
        if self.problem:
            raise RuntimeError(self.problem)


@contextmanager
def entering(engines):
    """A server whose door opens when its engines are warm: (address, door, the thread in which it is waited for)."""
    pool, limits, door = Pool([Worker(engine) for engine in engines], 64), Limits(HOSTS), Door()
    failed = []

    def enter():
        try:
            chat_web.enter(door, Served(pool, TOKENIZER, "tiny", 500, "sft"), limits)
        except UserError as problem:
            failed.append(str(problem))

    with socket.create_server(("127.0.0.1", 0)) as at, listening(door, limits, at):
        waits = threading.Thread(target=enter)
        waits.start()
        yield f"http://127.0.0.1:{at.getsockname()[1]}", waits, failed
    pool.close()
    gc.unfreeze()  # what belongs to other tests


def test_the_door_stays_closed_until_every_replica_is_warm(capsys):
    engines = [Cold(), Cold()]
    with entering(engines) as (address, waits, failed):
        body = dict(messages=say("x"))
        for warmed in range(2):
            assert wait_until(lambda: sum(one.inside.is_set() for one in engines) > warmed)  # noqa: B023 (called here)
            assert sum(one.inside.is_set() for one in engines) == warmed + 1  # one after the other
            answer = httpx.get(address + "/health")
            assert answer.status_code == 503 and answer.json() == dict(status="loading")
            assert httpx.post(address + "/v1/chat/completions", json=body).json()["error"]["code"] == "loading"
            next(one for one in engines if one.inside.is_set() and not one.goes.is_set()).goes.set()
        waits.join(10)
        assert gc.get_freeze_count() > 10_000  # a full collection would stop everything
        assert httpx.get(address + "/health").json() == dict(status="ok") and not failed
        assert httpx.post(address + "/v1/chat/completions", json=body).status_code == 200


def test_nothing_stays_frozen_when_the_server_ends():
    """Or Triton's bindings print 30 lines about leaks."""

    def serve():
        gc.freeze()
        sys.exit(3)

    with pytest.raises(SystemExit, match="3"):
        background.end_at_once(serve)
    assert gc.get_freeze_count() == 0


def test_a_replica_that_dies_while_it_is_warmed(capsys):
    engines = [Cold("CUDA out of memory"), Cold()]
    for engine in engines:
        engine.goes.set()
    with entering(engines) as (address, waits, failed):
        waits.join(10)
        assert httpx.get(address + "/health").json()["status"] == "degraded" and not failed
        assert "a replica is dead, the others serve: RuntimeError: CUDA out of memory" in capsys.readouterr().out
    engines = [Cold("CUDA out of memory")]
    engines[0].goes.set()
    with entering(engines) as (address, waits, failed):
        waits.join(10)
        assert failed == [
            "no replica could be started: RuntimeError: CUDA out of memory; fewer --slots need less memory"
        ]
        assert httpx.get(address + "/health").json() == dict(status="loading")


def test_real_engines_answer_as_one_would():
    alone, several = (Pool([Worker(Engine(tiny.model(), 4)) for _ in range(n)], 64) for n in (1, 2))
    answers = []
    for pool in (alone, several):
        listeners = [Listener(seed=i, max_tokens=20) for i in range(6)]
        submit(pool, *listeners)
        assert wait_until(lambda listeners=listeners: all(one.over for one in listeners), 20)
        answers.append([one.text for one in listeners])
        pool.close()
    assert answers[0] == answers[1] and len(set(answers[0])) > 1


def test_the_server_goes_on_with_one_replica_dead():
    dying, well = Dying(), mock.Parrot(TOKENIZER, 4)
    with serving([dying, well], TOKENIZER, 500) as server:
        dying.falls.set()
        lost = httpx.post(server[0] + "/v1/chat/completions", json=dict(messages=say("x")))
        assert lost.status_code == 503 and "the card fell off" in lost.json()["error"]["message"]
        health = httpx.get(server[0] + "/health")
        assert health.status_code == 200
        assert health.json() == dict(status="degraded", problem="RuntimeError: the card fell off")
        for i in range(3):
            answer = client(server).chat.completions.create(model="tiny", messages=say(f"word {i}"))
            assert answer.choices[0].message.content == f"word {i}"
        with httpx.stream("POST", server[0] + "/chat/completions", json=dict(messages=say("old"))) as old:
            assert '"gpu": 1' in next(old.iter_lines())
        assert httpx.get(server[0] + "/stats").json()["alive"] == 1
