"""The page where it was wrong once: input methods, nested lists and fences, a full storage, what was stored damaged."""

import hashlib
import json
from pathlib import Path

import pytest
from test_page import answers, browser, page, parrot, playwright, pytestmark, send, serious  # noqa: F401 (two fixtures)

from nanochat.data.microworld import World
from nanochat.web import mock, suggestions

VENDOR = Path(mock.__file__).parent / "static" / "vendor"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    report = tmp_path_factory.mktemp("report") / "report.html"
    report.write_text("<!doctype html><title>card</title><style>p { color: rgb(1, 2, 3) }</style><p>card</p>")
    with parrot(card=suggestions.of_the_world(World()), report=report) as address:
        yield address


def rendered(page, text):  # noqa: F811
    """(outline of the elements, text, milliseconds) of a model's Markdown."""
    return page.evaluate(
        """async (text) => {
            const { markdown } = await import("/static/markdown.js");
            const started = performance.now(), made = document.createElement("div");
            made.append(markdown(text));
            const seconds = performance.now() - started;
            const outline = (node) => [...node.children].map((one) =>
                one.tagName.toLowerCase() + (one.children.length ? `(${outline(one)})` : "")).join(" ");
            return [outline(made), made.textContent, seconds];
        }""",
        text,
    )


def test_the_vendored_parser_is_as_published():
    for line in (VENDOR / "SHA256SUMS").read_text().splitlines():
        wanted, name = line.split()
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == wanted, name
    assert "MIT" in (VENDOR / "README.md").read_text()
    assert "Vitaly Puzrin" in (VENDOR / "markdown-it.LICENSE").read_text()


OUTLINES = {
    "1. one\n\n2. two\n\n3. three": "ol(li(p) li(p) li(p))",
    "- a\n  - b\n    - c\n- d": "ul(li(ul(li(ul(li)))) li)",
    "3. a\n4. b": "ol(li li)",
    "- a\n\n  ```\n  code\n  ```\n- b": "ul(li(p div(button pre(code))) li(p))",
    "````\n```\ninner\n```\n````": "div(button pre(code))",
    "a\nb **c** *d* `e`": "p(br strong em code)",
    "# A\n\n###### B": "h3 h6",
    "|a|b|\n|-|:-:|\n|c|d|": "table(thead(tr(th th)) tbody(tr(td td)))",
    "[a](https://example.org) [b](javascript:alert(1)) ![c](http://a.b/c)": "p(a a)",
    "<b>x</b> <i>": "p",
    "- " * 30 + "x": "ul(li(" * 7 + "ul(li" + ")" * 15,
}


def test_markdown_as_models_write_it(page):  # noqa: F811
    for text, outline in OUTLINES.items():
        found, shown, _ = rendered(page, text)
        assert found == outline, text
        for words in ("code", "inner", "three", "javascript:alert(1)", "<b>x</b> <i>"):
            assert words not in text or words in shown
    deep = "\n".join("  " * i + f"- a{i}" for i in range(30))
    assert all(f"a{i}" in rendered(page, deep)[1] for i in range(30))


def test_no_text_stops_the_page(page):  # noqa: F811
    many = (" " * 100_000 + "x|", "a\n" * 50_000, "*a " * 20_000, "[" * 50_000, ">" * 50_000, "1. a\n" * 20_000)
    found = [rendered(page, text + "a") for text in many]
    print([round(milliseconds) for _, _, milliseconds in found])
    assert all("a" in shown for _, shown, _ in found)


def test_an_ordered_list_begins_where_it_says(page):  # noqa: F811
    send(page, "say: 3. a\n4. b")
    assert answers(page).locator("ol").get_attribute("start") == "3"


def test_enter_that_ends_a_word_of_an_input_method_sends_nothing(page):  # noqa: F811
    press = "(box, how) => box.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', bubbles: true, ...how}))"
    ways = (dict(isComposing=True), dict(keyCode=229))
    box = page.get_by_test_id("composer")
    box.fill("say: first")
    for how in ways:
        box.evaluate(press, how)
    assert answers(page).count() == 0 and box.input_value() == "say: first"
    page.keyboard.press("Enter")
    page.get_by_test_id("stats").wait_for()
    page.get_by_test_id("edit").click()
    edit = page.get_by_test_id("edit-box")
    edit.fill("say: half")
    for how in ways:
        edit.evaluate(press, how)
    assert edit.is_visible() and answers(page).inner_text() == "first"
    page.keyboard.press("Enter")
    playwright.expect(answers(page)).to_have_text("half")


def test_a_full_storage_loses_tokens_first_and_says_so(page):  # noqa: F811
    """Eleven conversations whose tokens take half a megabyte each."""
    token = dict(token="x" * 2000, logprob=-0.1, bytes=[120], top_logprobs=[])
    answer = dict(role="assistant", parts=[dict(type="text", text="y")], tokens=[token] * 200)
    talks = [dict(id=str(i), messages=[dict(role="user", parts=[dict(type="text", text=f"q{i}")]), answer])
             for i in range(11)]  # fmt: skip
    page.evaluate("all => localStorage.setItem('nanochat-conversations', JSON.stringify(all))", talks)
    page.reload()
    page.get_by_test_id("new-chat").click()
    page.evaluate("""() => {
        for (let n = 1 << 20; n >= 16; n /= 2)
            try { localStorage.filling = (localStorage.filling ?? "") + "z".repeat(n); } catch { /* less, then */ }
    }""")
    send(page, "say: one more")
    assert "tokens are no longer kept" in page.locator('[data-role="note"]').inner_text()
    send(page, "say: and more")
    assert page.locator('[data-role="note"]').count() <= 1  # said once
    kept = json.loads(page.evaluate("localStorage['nanochat-conversations']"))
    assert len(kept) == 12
    with_tokens = [bool(talk["messages"][-1].get("tokens")) for talk in kept]
    assert with_tokens == sorted(with_tokens, reverse=True) and with_tokens[0] and not with_tokens[-1]


WRONG = ('{"system": 7}', '{"theme": {"a": 1}, "seed": "x"}', '{"temperature": "hot", "topK": null, "maxTokens": -3}')
BEYOND = '{"topK": 1000000000, "maxTokens": 1e30, "seed": 1e30, "temperature": 1e30}'  # what the server refuses


def test_stored_settings_of_a_wrong_type_are_not_used(page):  # noqa: F811
    for stored in (*WRONG, BEYOND, "[1]"):
        page.evaluate("value => localStorage.setItem('nanochat-settings', value)", stored)
        page.reload()
        page.get_by_test_id("new-chat").click()
        with page.expect_request("**/v1/chat/completions") as sent:
            send(page, "say: ok")
        body = sent.value.post_data_json
        assert answers(page).inner_text() == "ok" and body["messages"][0]["role"] == "user"
        assert (body["temperature"], body["top_k"], body["max_tokens"]) == (0.6, 50, 256) and "seed" not in body


def test_settings_that_the_server_refuses_are_not_taken(page):  # noqa: F811
    page.get_by_test_id("settings-open").click()
    for field in ("max-tokens", "seed"):
        page.get_by_test_id(field).fill("9" * 30)
    page.get_by_test_id("settings-close").click()
    for line, said in (("/topk 1000000000", "Top-k is 50;"), ("/temperature 1e30", "Temperature is 0.6;")):
        send(page, line, wait=False)
        assert said in page.locator('[data-role="note"]').last.inner_text()
    with page.expect_request("**/v1/chat/completions") as sent:
        send(page, "say: ok")
    body = sent.value.post_data_json
    assert (body["temperature"], body["top_k"], body["max_tokens"]) == (0.6, 50, 256) and "seed" not in body


BROKEN = (dict(stats={}), dict(stats="x"), dict(tokens=[{}], stats=None), dict(tokens=7), dict(stats=dict(tokens=1)))


def test_broken_statistics_and_tokens_are_left_out(page):  # noqa: F811
    part = [dict(type="text", text="kept")]
    messages = [dict(role=role, parts=part, **(broken if role == "assistant" else {}))
                for broken in BROKEN for role in ("user", "assistant")]  # fmt: skip
    stored = json.dumps([dict(id="a", messages=messages)])
    page.evaluate("value => localStorage.setItem('nanochat-conversations', value)", stored)
    page.reload()
    assert answers(page).all_inner_texts() == ["kept"] * len(BROKEN)
    assert page.get_by_test_id("stats").count() == 0 and page.get_by_test_id("tokens-toggle").count() == 0


def test_the_first_look_says_what_the_model_knows(page):  # noqa: F811
    offered = page.get_by_test_id("example")
    playwright.expect(offered).to_have_count(5)
    texts = offered.all_inner_texts()
    assert all("\n" in text for text in texts) and "nobody of this name" in texts[2]
    assert "invented world" in page.locator(".welcome").inner_text()
    with page.context.expect_page() as opened:
        page.get_by_test_id("report").click()
    assert opened.value.locator("p").inner_text() == "card"
    assert opened.value.locator("p").evaluate("p => getComputedStyle(p).color") == "rgb(1, 2, 3)"
    opened.value.close()
    offered.nth(3).click()
    page.get_by_test_id("stats").wait_for()
    assert page.get_by_test_id("tool-call").inner_text().split("\n") == ["calculator", "27 + 58", "=", "85"]


DARK, LIGHT = (dict(color_scheme=scheme, bypass_csp=True) for scheme in ("dark", "light"))
LOOKS = [pytest.param(DARK, id="dark"), pytest.param(LIGHT, id="light", marks=pytest.mark.slow)]


@pytest.mark.parametrize("page", LOOKS, indirect=True)
def test_the_new_parts_are_accessible(page):  # noqa: F811
    playwright.expect(page.get_by_test_id("example")).to_have_count(5)
    assert not serious(page)
    page.get_by_test_id("settings-close").click()
    send(page, "say: 1. one\n\n   - nested\n\n2. two\n\n| a | b |\n|--:|:-:|\n| c | d |\n\n````\n```\nx\n```\n````")
    assert not serious(page)
