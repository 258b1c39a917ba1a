"""The report card's evaluation: tables, pictures, links, what is partial, and summaries of older versions."""

import json
import math
import re
from pathlib import Path

import pytest
import tiny

from nanochat import records, scores
from nanochat.dots import Band, picture
from nanochat.render import Figure, Link, Section, Table, markdown, page, standing_alone
from nanochat.run import Run
from nanochat.tasks import TASKS

COUNTS = dict(right=30, wrong=60, refused=10)
OLD = dict(wanted="right", n=100, counts=COUNTS, rate=0.3, low=0.22, high=0.4, examples={})  # as before issue 18
LETTERS = {letter: dict(expected=0.25, chosen=share) for letter, share in zip("ABCD", (0.7, 0.1, 0.1, 0.1))}
PERMUTED = dict(
    n=100, rate=0.27, low=0.25, high=0.29, steady=0.05, by_position=dict(A=0.8, B=0.1, C=0.1, D=0.08), letters=LETTERS
)
CORE = dict(
    tasks=dict(
        hellaswag=dict(accuracy=0.31, centered=0.08, n=500, low=0.27, high=0.35, baseline=0.25, cropped=0),
        lambada=dict(accuracy=0.12, centered=0.12, n=50, low=0.06, high=0.24, baseline=0.0, cropped=3),
    ),
    core=0.1, low=0.06, high=0.16, partial=True, missing=["squad"], failed={"squad": "no memory"},
    controls=dict(shuffled=dict(hellaswag=0.25, lambada=0.02), removed=dict(hellaswag=0.26)),
)  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return Run.open("a")


def report(run, **summary):
    run.write_summary("eval", summary)
    assert tiny.call("report", "--run=a") == 0
    return (run.folder / "report.md").read_text()


def test_all_of_it(run, capsys):
    new = dict(
        OLD, kind="categorical", chance=0.25, letters=LETTERS, permuted=PERMUTED, outcomes="r", asked="x", cropped=0
    )
    sampled = {"pass": {"1": dict(rate=0.2, low=0.1, high=0.3), "4": dict(rate=0.5, low=0.4, high=0.6)}}
    whole = dict(score=0.1, low=0.05, high=0.2, partial=True, missing=["mmlu"])
    chat = dict(
        mid=dict(choice=OLD), sft=dict(choice=new, add_tool=dict(OLD, **sampled, settings=dict(temperature=0.7)))
    )
    text = report(run, chat=chat, core=dict(base=CORE), chatcore=dict(sft=whole), core_hf={"openai/gpt2": CORE})
    for part in (
        "| – | 30.0% right (22.0% to 40.0%, n=100) | 30.0% right",
        "| – | – | 0.1000 (0.0500 to 0.2000; partial, without mmlu) | – |",
        "| SFT, temperature 0.7 | 20.0% (10.0% to 30.0%) | 50.0% (40.0% to 60.0%) |",
        "| hellaswag | 31.0% (27.0% to 35.0%, n=500) | 25.0% | 0.0800 | 0 | 25.0% | 26.0% |",
        "| lambada | 12.0% (6.0% to 24.0%, n=50) | 0.0% | 0.1200 | 3 | 2.0% | – |",
        "CORE, partial: 2 of 3 tasks](",
        "[CORE, BASE](",
        "[CORE, openai/gpt2 (Hugging Face)](",
        "|  |  | 0.1000 (0.0600 to 0.1600) |  | 0.0100 | 0.0133 |",
        "Missing: squad.",
        "squad failed: no memory",
        "| SFT, n=100 | A 70% (25%), B 10% (25%), C 10% (25%), D 10% (25%) | 30.0% | 27.0% (25.0% to 29.0%) "
        "| A 80%, B 10%, C 10%, D 8% | 5.0% |",
    ):
        assert part in text, part
    out = capsys.readouterr().out
    assert "facts" not in out and "](" not in out and "CORE, partial: 2 of 3 tasks" in out
    html = (run.folder / "report.html").read_text()
    assert html.count("<svg") == 2 == text.count("](report_")
    for name in re.findall(r"\]\((report_\w+\.svg)\)", text):
        svg = (run.folder / name).read_text()
        assert svg.startswith("<svg ") and 'xmlns="http://www.w3.org/2000/svg"' in svg and svg.endswith("</svg>")


def test_links_lead_to_headings_that_are_agreed(run):
    text = report(run, chat=dict(sft={name: OLD for name in TASKS}), core=dict(base=CORE))
    targets = set(re.findall(r"\]\((\S+)#(\S+)\)", text))
    assert {(run.folder / path).resolve() for path, _ in targets} == {scores.MEANING}
    headings = "CORE|Bits per byte|ARC|MMLU|GSM8K|HumanEval|SpellingBee|ChatCORE|The small world's tasks|Intervals"
    anchors = {h.lower().replace("'", "").replace(" ", "-") for h in f"{headings}|Letter bias|Controls".split("|")}
    assert {anchor for _, anchor in targets} <= anchors and {"core", "controls", "the-small-worlds-tasks"} <= {
        anchor for _, anchor in targets
    }


def test_older_summaries_still_give_a_report(run):
    text = report(run, chat=dict(sft=dict(facts_taught=OLD, choice=OLD)), base=dict(train_bpb=1.0, val_bpb=1.1))
    assert "30.0% right" in text and "ChatCORE" not in text and "Letter bias" not in text and "## CORE" not in text
    (run.folder / "eval" / "summary.json").unlink()
    assert tiny.call("report", "--run=a") == 0
    assert "## Evaluation" not in (run.folder / "report.md").read_text()


@pytest.mark.parametrize(
    "summary, why",
    [
        (dict(core=[]), "core is no object"),
        (dict(core=dict(base=dict(CORE, tasks=3))), "core, base: tasks is of another type"),
        (dict(chatcore=dict(sft=dict(score=0.1))), "chatcore, sft: low is missing"),
        (dict(chat=dict(sft=dict(choice=dict(OLD, rate="x")))), "chat, sft: choice: rate is of another type"),
        (dict(chat=dict(sft=[])), "chat, sft: it is no object"),
        (dict(base=dict(train_bpb=1.0)), "base: val_bpb is missing"),
        (dict(chat=dict(sft=dict(choice=dict(OLD, rate=math.nan)))), "chat, sft: choice: rate is of another type"),
        (dict(chat=dict(sft=dict(choice=dict(OLD, counts={})))), "chat, sft: choice: counts: right is missing"),
        (dict(chat=dict(sft=dict(choice=dict(OLD, wanted="x")))), "chat, sft: choice: wanted is of another type"),
        (
            dict(chat=dict(sft=dict(choice=dict(OLD, **{"pass": {"k": {}}})))),
            "chat, sft: choice: pass is of another type",
        ),
        (
            dict(chat=dict(sft=dict(choice=dict(OLD, examples=dict(wrong=[dict(outcome="wrong")]))))),
            "chat, sft: choice: examples: wrong: 0: question is missing",
        ),
        (dict(core=dict(base=dict(CORE, tasks=dict(x={})))), "core, base: tasks: x: accuracy is missing"),
        (
            dict(core=dict(base=dict(CORE, controls=dict(shuffled=dict(x="1"))))),
            "core, base: controls: shuffled is of another type",
        ),
        (dict(int8=dict(sft=dict(dtype="bf16", bpb=[1.0], tasks={}))), "int8, sft: bpb is of another type"),
    ],
)
def test_a_damaged_summary_is_reported(summary, why):
    assert records.lacks("eval", summary) == why


def test_a_task_without_questions_of_an_older_version_is_no_damage():
    empty = dict(OLD, n=0, rate=math.nan, low=math.nan, high=math.nan)
    assert records.lacks("eval", dict(chat=dict(sft=dict(choice=empty)))) == ""


def test_the_picture_is_to_scale():
    bands = [
        Band("one <b>", dict(base=(0.5, 0.25, 0.75), sft=(1.0, 0.9, 1.0)), 0.25),
        Band("two", dict(sft=(0.0, -0.2, 0.1))),
    ]
    svg = picture("T <i>", bands)
    assert "<b>" not in svg and "<i>" not in svg and "https" not in svg
    bars = re.findall(r'</title><line x1="([\d.]+)" x2="([\d.]+)" y1="([\d.]+)"', svg)
    (a, b, first), (_, end, second), (c, d, third) = [tuple(map(float, bar)) for bar in bars]
    ticks = dict(
        (text, float(x)) for x, text in re.findall(r'x="([\d.]+)" y="[\d.]+" text-anchor="middle">(\d+)%', svg)
    )
    assert a == ticks["25"] and b == ticks["75"] and end == ticks["100"] and c < ticks["0"] < d
    assert first < second < third and svg.count('r="4"') == 3 and svg.count('r="3.5"') == 2  # and in the legend
    assert ">BASE<" in svg and ">SFT<" in svg and ">MID<" not in svg


def test_other_models_stand_beside_the_stages():
    names = [f"somebody/model-{i}" for i in range(5)]
    scores = {name: (0.5, 0.25, 0.75) for name in ("sft", *names)}
    svg = picture("T", [Band("one", scores)])
    assert svg.count("<polygon") == 10 and svg.count('r="4"') == 2  # and in the legend
    legend = [(float(x), float(y)) for x, y in re.findall(r'<text x="([\d.]+)" y="([\d.]+)">', svg)]
    assert len(legend) == 6 == len(set(legend)) and len({y for _, y in legend}) > 1  # lines, none beyond the edge
    assert max(x for x, _ in legend) + 7 * len(names[0]) < 760
    first = float(re.search(r'</title><line x1="[\d.]+" x2="[\d.]+" y1="([\d.]+)"', svg)[1])
    assert first > max(y for _, y in legend)


def test_cells_with_links_are_escaped():
    link = Link('a <b> | "c"', 'x"y#z')
    section = Section("S", [Table((link, "n"), [(link, "1")]), Figure("F", "<svg a></svg>", "f.svg")])
    html, text = page("T", [section]), markdown("T", [section])
    assert '<a href="x&quot;y#z">a &lt;b&gt; | &quot;c&quot;</a>' in html
    assert text.count('[a <b> \\| "c"](x"y#z)') == 2 and "![F](f.svg)" in text
    plain = markdown("T", [section], links=False)
    assert "](" not in plain and "(plot: F)" in plain
    assert standing_alone(section.blocks[1]).startswith("<svg a xmlns=")


def test_every_task_has_its_paragraph():
    assert Path(scores.MEANING).name == "evaluation.md"
    assert scores.of_task(Run("x", Path("/tmp/x")), "gsm8k").target.endswith("#gsm8k")
    assert json.dumps(scores.PARAGRAPHS).count("ARC") == 2
