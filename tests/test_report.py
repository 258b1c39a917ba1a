import re
import shutil

import pytest
import tiny

from nanochat import report
from nanochat.render import Curve, Section, Table, markdown, page, svg, thinned

NASTY = "<script>alert(1)</script> | \"quoted\" & 'more'\nsecond line"
SECTIONS = [
    Section("One & two", [Table(("a", "b"), [(NASTY, "2")]), "text", f"You: {NASTY}\nnanochat: x"]),
    Section("Curves", [Curve("loss <b>", [(i, 5.0 / (i + 1)) for i in range(1000)])]),
]


def test_the_page_stands_alone_and_escapes_everything():
    text = page("T <i>", SECTIONS)
    assert text.startswith("<!doctype html>") and text.count("<script") == 0
    assert "&lt;script&gt;" in text and "T &lt;i&gt;" in text and "loss &lt;b&gt;" in text
    assert not re.search(r"""(src|href)=|url\(|@import|https?:""", text)
    for tag in ("section", "table", "figure", "svg", "blockquote", "main"):
        assert text.count(f"<{tag}") == text.count(f"</{tag}>") > 0


def test_a_long_name_leaves_a_phone_room_for_the_numbers_beside_it(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not (chromium := shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("there is no Chromium here (Debian: apt-get install chromium)")
    flags = (
        "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync"
    ).split()
    head = ("operator", "category", "calls", "ms", "GB/s", "of the limit", "predicted / actual")
    rest = ("norms, pointwise", "160", "1,234.567", "–", "–", "–")
    names = ("aten::mm", "aten::_scaled_dot_product_flash_attention_for_cpu", "k" * 80)
    file = tmp_path / "page.html"
    file.write_text(page("T", [Section("s", [Table(head, [(name, *rest) for name in names])])]))
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=flags)
        for width in (375, 1200):
            shown = browser.new_page(viewport=dict(width=width, height=700))
            shown.goto(file.as_uri())
            ends = shown.locator("th").evaluate_all("all => all.map(cell => cell.getBoundingClientRect().right)")
            heights = shown.locator("tr").evaluate_all("all => all.map(row => row.getBoundingClientRect().height)")
            assert ends[3] <= width - 16 and shown.evaluate("document.documentElement.scrollWidth") == width
        assert heights[1] == heights[2], "where there is room a name of 50 letters does not break"
        browser.close()


def test_a_path_that_is_no_text_does_not_end_the_report(tmp_path, monkeypatch):
    """Bytes that are no UTF-8 are surrogates in Python."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(report, "sections", lambda run: [Section("Data", ["caf\udce9.txt"])])
    (tmp_path / "runs" / "a").mkdir(parents=True)
    assert tiny.call("report", "--run=a") == 0
    for name in ("report.md", "report.html"):
        assert r"caf\udce9.txt" in (tmp_path / "runs" / "a" / name).read_text()


def test_markdown_tables_keep_their_columns():
    lines = markdown("T", SECTIONS).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 3
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)


def test_curves_begin_and_end_where_the_data_does():
    points = [(float(i), float(i % 7)) for i in range(1001)]
    few = thinned(points, 8)
    assert few[0] == points[0] and few[-1] == points[-1] and len(few) <= 10
    assert thinned(points[:2], 8) == points[:2]
    drawn = re.search(r'polyline points="([^"]+)"', svg(Curve("c", points))).group(1).split()
    places = [tuple(map(float, point.split(","))) for point in drawn]
    assert places == sorted(places, key=lambda place: place[0])
    assert all(0 <= x <= 640 and 0 <= y <= 240 for x, y in places)
    svg(Curve("flat", [(0.0, 1.0), (1.0, 1.0)]))
