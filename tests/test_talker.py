"""The page and the API in front of a model that was really trained, through the real engine."""

import math
import time

import openai
import pytest
import talker
import test_page
import torch
from test_page import answers, browser, page, playwright, send  # noqa: F401 (browser and page are fixtures)
from test_web import serving, wait_until

from nanochat.engine import Engine

pytestmark = test_page.pytestmark


class Leisurely(Engine):
    """As fast as its model, until it is told to take its time: an answer must last until somebody stops it."""

    pause = 0.0

    def step(self):
        time.sleep(self.pause)
        return super().step()


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with talker.engine(tmp_path_factory, Leisurely) as made:
        yield made


@pytest.fixture(scope="module")
def server(engine):
    with serving(engine, engine.tokenizer, engine.config.sequence_len) as (address, _):
        yield address


@pytest.fixture
def slow(engine):
    engine.pause = 0.05
    yield
    engine.pause = 0.0


def answer_to(question):
    return talker.text_of(talker.ANSWERS[question])


def settle(page):  # noqa: F811
    """Answers by heart: always the likeliest token."""
    page.keyboard.type("/temperature 0")
    page.keyboard.press("Enter")


@pytest.mark.slow
def test_a_first_conversation(page):  # noqa: F811
    """Example, calculator, follow-up, Markdown, history after a reload, another conversation, the tokens."""
    settle(page)
    page.get_by_test_id("new-chat").click()
    page.get_by_test_id("example").filter(has_text="27 + 58").click()
    page.get_by_test_id("stats").wait_for()
    assert page.get_by_test_id("tool-call").inner_text().split("\n") == ["calculator", "27 + 58", "=", "85"]
    assert answers(page).inner_text().endswith("27 + 58 is 85.")
    send(page, "Show a list.")
    assert answers(page).last.locator("li").all_inner_texts() == ["one", "two", "three"]
    assert answers(page).last.locator("strong").inner_text() == "two"
    page.reload()
    assert answers(page).count() == 2 and "85" in answers(page).first.inner_text()
    page.get_by_test_id("new-chat").click()
    send(page, "What is the capital of France?")
    assert answers(page).inner_text() == answer_to("What is the capital of France?")
    assert page.get_by_test_id("conversation").count() == 2
    page.get_by_test_id("tokens-toggle").click()
    tokens = page.get_by_test_id("token")
    assert "".join(tokens.all_inner_texts()).replace("·", " ") == answer_to("What is the capital of France?")
    tokens.nth(2).click()
    rows = page.get_by_test_id("alternatives").locator("li")
    assert rows.count() == 8 and "taken" in rows.first.get_attribute("class")
    shares = [float(row.split("\n")[-1].rstrip("%")) for row in rows.all_inner_texts()]
    assert shares == sorted(shares, reverse=True) and 90 < sum(shares) < 100.5


def test_stop_edit_while_it_answers_and_regenerate(page, slow):  # noqa: F811
    settle(page)
    send(page, "Count.", wait=False)
    playwright.expect(answers(page)).to_contain_text("1 2 3 4")
    page.get_by_test_id("stop").click()
    page.get_by_test_id("stats").wait_for()
    cut = answers(page).inner_text()
    assert "stopped" in page.get_by_test_id("stats").inner_text() and answer_to("Count.").startswith(cut.strip())
    page.get_by_test_id("regenerate").click()
    playwright.expect(answers(page)).to_contain_text("1 2 3")
    page.get_by_test_id("edit").click()  # while the second answer is being written
    page.get_by_test_id("edit-box").fill("Who are you?")
    page.get_by_test_id("edit-send").click()
    page.get_by_test_id("stats").wait_for()
    assert answers(page).all_inner_texts() == [answer_to("Who are you?")]
    send(page, "Hello!")
    assert answers(page).all_inner_texts() == [answer_to("Who are you?"), answer_to("Hello!")]
    page.reload()
    assert answers(page).all_inner_texts() == [answer_to("Who are you?"), answer_to("Hello!")]


@pytest.mark.parametrize(
    "page",
    [dict(test_page.PHONE, bypass_csp=True), dict(color_scheme="light", bypass_csp=True)],
    indirect=True,
    ids=["phone, dark", "light"],
)
def test_by_keyboard_alone_at_every_width_and_for_everybody(page):  # noqa: F811
    settle(page)
    for question in ("What is the capital of France?", "Show a list."):
        page.keyboard.type(question)
        page.keyboard.press("Enter")
        page.get_by_test_id("send").wait_for()
        playwright.expect(answers(page).last).to_contain_text(answer_to(question)[:3])
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.keyboard.press("Control+Shift+O")
    assert answers(page).count() == 0 and page.evaluate("document.activeElement.id") == "composer"
    page.keyboard.type("Show a list.")
    page.keyboard.press("Enter")
    page.get_by_test_id("tokens-toggle").first.click()
    page.get_by_test_id("token").first.press("Enter")
    assert not test_page.serious(page)


def test_whoever_leaves_or_stops_frees_the_engine(page, slow, engine):  # noqa: F811
    settle(page)
    send(page, "Count.", wait=False)
    playwright.expect(answers(page)).to_contain_text("1 2 3")
    assert len(engine.running) == 1
    page.get_by_test_id("new-chat").click()
    assert wait_until(lambda: not engine.running)
    page.get_by_test_id("conversation").click()
    assert answer_to("Count.").startswith(answers(page).inner_text().strip())  # what had come is kept


def test_log_probabilities_are_those_of_the_model(server, engine):
    """Against the model itself, without cache or server."""
    client = openai.OpenAI(base_url=server + "/v1", api_key="none")
    question = [dict(role="user", content="Hello!")]
    answer = client.chat.completions.create(
        model="tiny", messages=question, temperature=0, logprobs=True, top_logprobs=20
    )
    assert answer.choices[0].message.content == answer_to("Hello!")
    prompt = engine.tokenizer.render_for_completion(question)
    ids = engine.tokenizer.encode(answer_to("Hello!"))
    tokens = answer.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == answer_to("Hello!")
    with torch.inference_mode():
        logp = torch.log_softmax(engine.model(torch.tensor([[*prompt, *ids]]))[0, len(prompt) - 1 : -1], -1)
    for i, token in enumerate(tokens):
        assert token.logprob == pytest.approx(logp[i, ids[i]].item(), abs=1e-3)
        assert sum(math.exp(other.logprob) for other in token.top_logprobs) <= 1 + 1e-5
        assert token.top_logprobs[0].bytes == token.bytes and len(token.top_logprobs) == 20
        assert [o.logprob for o in token.top_logprobs] == sorted((o.logprob for o in token.top_logprobs), reverse=True)
