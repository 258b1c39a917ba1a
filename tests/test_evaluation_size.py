"""How many questions a speedrun asks: within the time, and fewer where a machine is slower."""

import pytest

from nanochat import evaluation_size, sandbox
from nanochat.tasks import CHATCORE


@pytest.fixture(autouse=True)
def everything_is_there(monkeypatch):
    monkeypatch.delenv("NANOCHAT_HUB_ROOT", raising=False)
    monkeypatch.setattr(sandbox, "missing", lambda: "")


def predicted(core: int, chat: int, rate: float, decode: float, context: int) -> float:
    """Seconds, written out once more."""
    core_tokens = core * 22 * 700 * 0.4
    answer = min(300, context - 75)
    chat_tokens = 3 * chat * (3 * 150 * 0.4 + 3 * (150 * 0.4 + answer * decode))
    return (core_tokens + chat_tokens) / rate + 3 * chat * 0.15 + 12


@pytest.mark.parametrize(
    "rate, device, decode, context, time",
    [(8_000.0, "cpu", 3, 256, 108.0), (14_000.0, "cpu", 3, 256, 108.0), (130_000.0, "cuda", 20, 2048, 1800.0)],
)
def test_the_sample_fits_into_the_time_and_uses_it(rate, device, decode, context, time):
    core, chat = evaluation_size.flags(time, rate, device, context)
    n, m = int(core["max_per_task"]), int(chat["max_problems"])
    assert predicted(n, m, rate, decode, context) <= time
    assert min(n, m) >= 20 and (max(n, m) == 500 or predicted(n, m, rate, decode, context) > 0.9 * time)
    assert core["eval"] == "core" and chat["tasks"] == ",".join(CHATCORE)


def test_a_slow_machine_asks_less_and_a_fast_one_no_more_than_500():
    slow, fast = (evaluation_size.flags(100.0, rate, "cpu", 256) for rate in (1.0, 1e9))
    assert slow[0] == {} and slow[1]["max_problems"] == 1  # CORE wants eleven rows of each task
    assert fast[0]["max_per_task"] == 500 and fast[1]["max_problems"] == 111  # the sandbox takes its time anywhere


def test_humaneval_is_not_asked_where_its_programs_cannot_be_isolated(monkeypatch):
    """Asked for, it would fail each stage's evaluation, and with it the run."""
    monkeypatch.setattr(sandbox, "missing", lambda: "Landlock")
    tasks = evaluation_size.flags(100.0, 1e5, "cuda", 2048)[1]["tasks"]
    assert tasks == ",".join(name for name in CHATCORE if name != "humaneval")


def test_the_time():
    assert evaluation_size.seconds(15.0, 700.0) == pytest.approx(108)
    assert [evaluation_size.seconds(None, base) for base in (60.0, 10_000.0, 1e6)] == [300.0, 500.0, 1800.0]
