"""The chat page in a real Chromium against the real server, with the parrot for a model: it says what we want said."""

import shutil
from contextlib import contextmanager

import pytest
import tiny
from test_web import serving

from nanochat.web import mock

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed, so no browser can be driven"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (Debian: apt-get install chromium)")
playwright.expect.set_options(timeout=30_000)
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
ATTACKS = (
    "<img src=x onerror=alert(1)>", "<svg/onload=alert(1)>", "[x](javascript:alert(1))", "<script>alert(1)</script>",
    '<iframe srcdoc="<script>alert(1)</script>">', "[y](data:text/html,<script>alert(1)</script>)", "![z](http://a.b/c)",
    "```\n<b>bold</b>\n```", "| <u>a</u> | b |\n|---|---|\n| <i>c</i> | d |",
)  # fmt: skip


@contextmanager
def parrot(**more):
    """The address of one that answers at once; a test that interrupts it has it speak slowly."""
    tokenizer = tiny.tokenizer()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mock, "SECONDS", 0.001)
        with serving(mock.Parrot(tokenizer, 8), tokenizer, mock.CONTEXT, **more) as (address, _):
            yield address


@pytest.fixture
def slowly(monkeypatch):
    monkeypatch.setattr(mock, "SECONDS", 0.02)


@pytest.fixture(scope="module")
def server():
    with parrot() as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        made = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield made
        made.close()


@pytest.fixture
def page(server, browser, request):
    """A page of a fresh profile. Any dialog, page error, CSP report, or request elsewhere fails the test."""
    context = browser.new_context(**getattr(request, "param", {}))
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=server)
    opened, wrong = context.new_page(), []
    opened.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on(
        "console", lambda m: wrong.append(m.text) if m.type == "error" and "net::ERR_FAILED" not in m.text else None
    )
    opened.on("request", lambda r: None if r.url.startswith((server, "data:")) else wrong.append(r.url))
    opened.set_default_timeout(30_000)
    opened.goto(server)
    yield opened
    context.close()
    assert not wrong


def send(page, text, wait=True):
    page.get_by_test_id("composer").fill(text)
    page.keyboard.press("Enter")
    if wait:
        page.get_by_test_id("stats").last.wait_for()
        page.get_by_test_id("send").wait_for()


def answers(page):
    return page.locator('[data-role="assistant"] .body')


def test_send_stream_and_reload(page, slowly):
    page.get_by_test_id("example").first.click()
    page.get_by_test_id("stats").wait_for()
    assert page.get_by_test_id("tool-call").inner_text().split("\n") == ["calculator", "27 + 58", "=", "85"]
    send(page, "say: **bold** and `code`")
    assert answers(page).last.locator("strong").inner_text() == "bold"
    assert "tokens/s" in page.get_by_test_id("stats").last.inner_text()
    page.reload()
    assert answers(page).count() == 2 and "85" in answers(page).first.inner_text()
    page.get_by_test_id("new-chat").click()
    assert answers(page).count() == 0 and page.get_by_test_id("conversation").count() == 1
    page.get_by_test_id("conversation").click()
    assert answers(page).count() == 2
    remove = page.get_by_test_id("conversation-delete")
    remove.click()
    assert answers(page).count() == 2  # the first click only asks
    remove.click()
    assert answers(page).count() == 0 and page.get_by_test_id("conversation").count() == 0


def test_stop_regenerate_edit_copy(page, slowly):
    send(page, "say: " + "word " * 300, wait=False)
    playwright.expect(answers(page)).to_contain_text("word word word")
    page.get_by_test_id("stop").click()
    page.get_by_test_id("stats").wait_for()
    assert "stopped" in page.get_by_test_id("stats").inner_text()
    page.get_by_test_id("edit").click()
    page.get_by_test_id("edit-box").fill("say: shorter")
    page.get_by_test_id("edit-send").click()
    page.get_by_test_id("stats").wait_for()
    assert page.locator('[data-role="user"]').count() == 1 and answers(page).inner_text() == "shorter"
    page.get_by_test_id("regenerate").click()
    page.get_by_test_id("stats").wait_for()
    assert answers(page).count() == 1 and answers(page).inner_text() == "shorter"
    page.locator('[data-role="assistant"]').get_by_test_id("copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == "shorter"


def test_tokens_and_their_alternatives(page):
    send(page, "say: the dog")
    page.get_by_test_id("tokens-toggle").click()
    tokens = page.get_by_test_id("token")
    assert "".join(tokens.all_inner_texts()).replace("·", " ") == "the dog"
    tokens.first.press("Enter")
    assert "90.0%" in page.get_by_test_id("alternatives").inner_text()


def test_keyboard_alone_and_slash_commands(page, slowly):
    assert page.evaluate("document.activeElement.id") == "composer"
    page.keyboard.type("/temperature 0.1")
    page.keyboard.press("Enter")
    page.keyboard.type("/topk 7")
    page.keyboard.press("Enter")
    page.keyboard.type("/help")
    page.keyboard.press("Enter")
    assert page.locator('[data-role="note"]').count() == 3 and answers(page).count() == 0
    page.keyboard.type("say: a")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("b")
    page.keyboard.press("Enter")
    page.get_by_test_id("stats").wait_for()
    assert page.locator('[data-role="user"] .body').inner_text() == "say: a\nb"
    page.keyboard.insert_text("say: " + "long " * 200)
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    playwright.expect(page.get_by_test_id("stats")).to_have_count(2)
    page.keyboard.press("Control+Shift+O")
    assert answers(page).count() == 0 and page.evaluate("document.activeElement.id") == "composer"


def test_who_pressed_a_button_that_is_gone_types_on_in_the_composer(page):
    focused = lambda: page.evaluate("document.activeElement.id")
    page.get_by_test_id("example").first.click()
    assert focused() == "composer"
    page.get_by_test_id("stats").wait_for()
    page.get_by_test_id("regenerate").click()
    assert focused() == "composer"
    page.get_by_test_id("stats").wait_for()
    page.get_by_test_id("edit").click()
    page.get_by_test_id("edit-send").click()
    assert focused() == "composer"
    page.get_by_test_id("stats").wait_for()
    for _ in range(2):
        page.get_by_test_id("conversation-delete").click()
    assert focused() == "composer" and answers(page).count() == 0


def test_a_word_with_a_slash_that_is_no_command_is_asked(page):
    for count, word in enumerate(("/usr/bin/python", "/dance", "/Help"), 1):
        page.keyboard.type(word)
        page.keyboard.press("Enter")
        playwright.expect(page.get_by_test_id("stats")).to_have_count(count)
    assert page.locator('[data-role="user"] .body').all_inner_texts() == ["/usr/bin/python", "/dance", "/Help"]
    assert page.locator('[data-role="note"]').count() == 0


def test_settings_are_kept_and_sent(page):
    page.get_by_test_id("settings-open").click()
    for name, value in (("temperature", "0.3"), ("top-k", "9"), ("max-tokens", "3"), ("system-prompt", "Be kind.")):
        page.get_by_test_id(name).fill(value)
    page.get_by_test_id("settings-close").click()
    page.reload()
    with page.expect_request("**/v1/chat/completions") as sent:
        send(page, "say: one two three four five")
    body = sent.value.post_data_json
    assert (body["temperature"], body["top_k"], body["max_tokens"]) == (0.3, 9, 3)
    assert body["messages"][0] == dict(role="system", content="Be kind.")
    assert "cut off" in page.get_by_test_id("stats").inner_text()


def test_what_a_model_writes_is_text(page):
    for attack in ATTACKS:
        page.get_by_test_id("new-chat").click()
        playwright.expect(page.get_by_test_id("stats")).to_have_count(0)
        send(page, f"say: {attack}")
        body = answers(page).last
        for tag in ("img", "svg", "iframe", "script", "u", "i", "b"):
            assert body.locator(tag).count() == 0, (attack, tag)
        assert all(href.startswith("http") for href in body.locator("a").evaluate_all("all => all.map(a => a.href)"))
        page.wait_for_timeout(100)


def test_a_server_that_is_away_is_said_and_tried_again(page):
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.get_by_test_id("composer").fill("say: hello")
    with_errors = page.locator('[data-role="error"]')
    page.keyboard.press("Enter")
    with_errors.wait_for()
    assert "cannot be reached" in with_errors.inner_text()
    page.unroute("**/v1/chat/completions")
    page.get_by_test_id("retry").click()
    page.get_by_test_id("stats").wait_for()
    assert answers(page).inner_text() == "hello" and with_errors.count() == 0


def test_damaged_storage_is_forgotten(page):
    for damage in ('[{"id": 3}, ', '[{"id": "a", "messages": [{"role": "user", "parts": [{"type": "text"}]}]}]', "7"):
        page.evaluate("value => localStorage.setItem('nanochat-conversations', value)", damage)
        page.reload()
        send(page, "say: fine")
        assert answers(page).inner_text() == "fine"


PHONE = dict(viewport=dict(width=375, height=700), color_scheme="dark")


@pytest.mark.parametrize("page", [PHONE], indirect=True, ids=["phone"])
def test_on_a_phone(page):
    send(page, "say: " + "averylongwordwithoutanyspace" * 6 + "\n\n```\n" + "x" * 200 + "\n```")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    page.get_by_test_id("history-toggle").click()
    page.get_by_test_id("new-chat").click()
    assert answers(page).count() == 0


LOOKS = [dict(color_scheme=scheme, bypass_csp=True) for scheme in ("light", "dark")]


def serious(page):
    """What axe finds serious or worse, in the conversation and in the settings."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    found = axe.Axe().run(page).response["violations"]
    page.get_by_test_id("settings-open").click()
    found += axe.Axe().run(page).response["violations"]
    return [(v["id"], v["nodes"][0]["html"][:120]) for v in found if v["impact"] in ("serious", "critical")]


@pytest.mark.parametrize("page", LOOKS, indirect=True, ids=["light", "dark"])
def test_accessible(page):
    send(page, "What is 1 + 1?")
    send(page, "say: # Title\n\n- a [link](https://example.org)\n\n```\ncode\n```\n\n> quoted")
    page.get_by_test_id("tokens-toggle").first.click()
    page.get_by_test_id("token").first.click()
    assert not serious(page)


def test_a_question_without_an_answer_is_offered_again_and_joins_the_next(page):
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.get_by_test_id("composer").fill("say: lost")
    page.keyboard.press("Enter")
    page.locator('[data-role="error"]').wait_for()
    page.reload()
    assert "not answered" in page.locator('[data-role="error"]').inner_text()
    page.unroute("**/v1/chat/completions")
    with page.expect_request("**/v1/chat/completions") as sent:
        send(page, "say: found")
    assert [m["content"] for m in sent.value.post_data_json["messages"]] == ["say: lost\n\nsay: found"]
    assert page.locator('[data-role="error"]').count() == 0 and answers(page).count() == 1


def test_two_tabs_keep_each_others_conversations(page):
    other = page.context.new_page()
    other.goto(page.url)
    send(page, "say: first")
    playwright.expect(other.get_by_test_id("conversation")).to_have_count(1)
    other.get_by_test_id("new-chat").click()
    send(other, "say: second")
    playwright.expect(page.get_by_test_id("conversation")).to_have_count(2)
    send(page, "say: third")
    page.reload()
    assert page.get_by_test_id("conversation").all_inner_texts() == ["say: first", "say: second"]


def test_an_answer_is_kept_though_another_tab_changed_the_history(page, slowly):
    send(page, "say: " + "word " * 300, wait=False)
    playwright.expect(answers(page)).to_contain_text("word word")
    page.evaluate("""() => {
        document.querySelector('[data-testid="new-chat"]').click();  // the answer ends only after both of these
        window.dispatchEvent(new StorageEvent("storage", { key: "nanochat-conversations" }));
    }""")
    page.wait_for_function("JSON.parse(localStorage['nanochat-conversations'])[0].messages.length === 2")
    page.get_by_test_id("conversation").click()
    playwright.expect(answers(page)).to_contain_text("word word")
    page.reload()
    playwright.expect(answers(page)).to_contain_text("word word")


@pytest.mark.slow
def test_deep_quotations_do_not_overflow(page):
    send(page, "say: " + ">" * 1200)
    assert answers(page).locator("blockquote").count() == 8
    page.reload()
    assert ">>>" in answers(page).inner_text()
