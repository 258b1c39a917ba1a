"""What the page is told of a model, and the report that is served beside it."""

import re

import httpx
import pytest
import tiny
from test_web import HOSTS, serving

from nanochat.data.microworld import World
from nanochat.run import Run
from nanochat.tasks.practice import PRACTICE
from nanochat.web import mock, suggestions
from nanochat.web.limits import Limits


def test_the_small_world_shows_one_of_each_kind():
    world = World()
    shown = suggestions.of_the_world(world)
    taught, read, unknown, sum_, word = (one["text"] for one in shown["suggestions"])
    named = lambda text: next((p for p in (*world.people, *world.unknown_eval) if p in text), None)
    kinds = lambda person: {fact.kind for fact in world.facts.get(person, [])}
    assert "taught" in kinds(named(taught)) and kinds(named(read)) == {"silent"}
    assert named(unknown) in world.unknown_eval
    assert re.search(r"\d+ \+ \d+", sum_) and "spell" in word and str(len(world.people)) in shown["about"]
    assert all(one["expect"] for one in shown["suggestions"])


PRACTISED = f"{PRACTICE['word_sums'].origin} {PRACTICE['word_sums'].task.name} 1d28"  # as rl_stage.py names it


@pytest.mark.parametrize(
    "data, shown",
    [
        ("microworld conversations (sft) 1d28", True), (PRACTISED, True), ("microworld documents 1d28", False),
        ("hub gsm8k 1d28", False), ("my.jsonl 1d28", False), (None, False),
    ],
)  # fmt: skip
def test_only_a_model_of_that_world_shows_it(monkeypatch, data, shown, tmp_path):
    monkeypatch.setattr(Run, "summary", lambda self, stage: None if data is None else dict(data=data))
    assert bool(suggestions.of_the_run(Run("a", tmp_path), "sft")) == shown


@pytest.mark.parametrize("key", ["", "k"])
def test_the_report_is_served_read_only_once_it_is_there(tmp_path, key):
    tokenizer, report = tiny.tokenizer(), tmp_path / "report.html"
    limits = Limits(HOSTS, key)
    with serving(mock.Parrot(tokenizer, 2), tokenizer, 500, limits=limits, report=report) as (address, _):
        headers = {"authorization": f"Bearer {key}"} if key else {}
        card = lambda: httpx.get(f"{address}/v1/models", headers=headers).json()["data"][0]
        assert card()["report"] is None and httpx.get(f"{address}/report", headers=headers).status_code == 404
        report.write_text("<p>card</p>")
        assert card()["report"] == (None if key else "/report")  # a link sends no key
        found = httpx.get(f"{address}/report", headers=headers)
        assert (
            found.text == "<p>card</p>"
            and "default-src 'none'; style-src 'unsafe-inline'" in (found.headers["content-security-policy"])
        )
        assert httpx.get(f"{address}/report").status_code == (401 if key else 200)
        assert httpx.put(f"{address}/report", headers=headers, content="x").status_code in (405, 415)
