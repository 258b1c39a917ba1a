"""LEARN.md and CONTRIBUTING.md: links, pictures and numbers; and every exercise, with right answers and wrong ones."""

import io
import json
import math
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from test_training import ROOT

from kernels.triton_utils import INSTALLED
from nanochat.course import CHAPTERS
from nanochat.course.chapter import number
from nanochat.course.reading import places, readings
from nanochat.errors import UserError
from profiling.__main__ import COMMANDS
from scripts import learn

PAGE = (ROOT / "LEARN.md").read_text("utf-8")
SECTIONS = re.split(r"^## \d+\. ", PAGE, flags=re.M)[1:]
PAGES = {name: (ROOT / name).read_text("utf-8") for name in ("LEARN.md", "CONTRIBUTING.md")}
LINKS = [(name, *link) for name, text in PAGES.items() for link in re.findall(r"\[([^\]]+)\]\(([^)]+)\)", text)]
UNITS = r"\d[\d,.]*\s?(?:%|(?:µs|ms|seconds|nats|bits|[KMG]i?B|[TG]B/s|TFLOP/s|tokens/s|tok/s)\b)"
needs_triton = pytest.mark.skipif(not INSTALLED, reason="Triton is not installed, so no kernel can run")


def slugs(text):
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)", text, re.M)}


def test_links_lead_to_what_they_name():
    assert len(LINKS) > 60
    for page, text, target in LINKS:
        path, _, anchor = target.partition("#")
        where = ROOT / path if path else ROOT / page
        assert where.exists(), (page, target)
        if anchor:
            assert anchor in slugs(where.read_text("utf-8")), (page, target)
        if text.startswith("`") and path.endswith(".py"):
            assert text.strip("`") in places(where), (page, text, target)


def test_places_are_those_of_the_file():
    path = ROOT / "nanochat" / "gpt.py"
    there, lines = places(path), path.read_text("utf-8").splitlines()
    assert (
        {"GPT", "GPT.forward", "SMEAR_CHANNELS"} <= set(there) and "GPT.backward" not in there and "torch" not in there
    )
    first, last = there["Attention"]
    assert lines[first - 1].startswith("class Attention(") and lines[last - 1].strip().startswith("return self.c_proj(")


def test_every_chapter_says_where_its_code_is():
    for i, section in enumerate(SECTIONS, 1):
        read = section[section.index("**Read.**") : section.index("**Exercise ")]
        wanted = re.findall(r"\]\((\S+?\.py)\)", read)
        found = readings(i)
        assert [line.split(":")[0] for line in found[: len(wanted)]] == wanted
        for line in found:
            if "  " in line:
                where, name = line.split(", ")[0].split("  ")
                path, at = where.split(":")
                text = (ROOT / path).read_text("utf-8").splitlines()[int(at) - 1]
                assert name.split(".")[-1] in text, line


def test_commands_are_there():
    commands = re.findall(r"python -m ([\w.]+)([^`\n#&|]*)", "\n".join(PAGES.values()))
    assert len(commands) > 15
    for module, rest in commands:
        if module == "profiling":
            module = COMMANDS[rest.split()[0]]
        path = ROOT / module.replace(".", "/")
        path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        if module in ("pytest", "mypy"):
            continue
        assert path.exists(), module
        for flag in re.findall(r"--([a-z][\w-]+)", rest):
            source = path.read_text("utf-8") + (ROOT / "nanochat" / "stages.py").read_text("utf-8")
            source += (ROOT / "kernels" / "readme.py").read_text("utf-8")
            assert flag in source or flag.replace("-", "_") in source, (module, flag)


@pytest.mark.parametrize(
    "i",
    [pytest.param(i, marks=needs_triton if i == 11 else ()) for i in range(len(CHAPTERS))],
    ids=lambda i: f"{i + 1}",
)
def test_a_chapter_shows_what_the_code_says(i):
    """Picture, question, title; and no measured number in its prose that is not in the picture."""
    chapter, section = CHAPTERS[i], SECTIONS[i]
    picture, prose = chapter.picture(), " ".join(section.split())
    assert section.startswith(chapter.title + "\n")
    assert f"\n```\n{picture}\n```\n" in section, f"python -m scripts.learn show {i + 1} prints\n{picture}"
    assert " ".join(chapter.question.split()) in prose, f"python -m scripts.learn show {i + 1} asks\n{chapter.question}"
    prose = re.sub(r"^```.*?^```$", "", section, flags=re.S | re.M)
    prose = " ".join(prose.split()).replace(" ".join(chapter.question.split()), "")
    for measured in re.findall(UNITS, prose):
        assert measured in picture, measured


def test_contributing_has_no_number_that_could_be_out_of_date():
    assert not re.findall(UNITS, PAGES["CONTRIBUTING.md"])


def test_every_chapter_has_its_parts():
    assert len(SECTIONS) == len(CHAPTERS)
    for section in SECTIONS:
        parts = ("**The idea.**", "**Read.**", "**Exercise ", "**Next.**")
        places = [section.find(part) for part in parts]
        assert -1 not in places and places == sorted(places)
        assert any(target.endswith(".py") for target in re.findall(r"\]\(([^)]+)\)", section))


# chapter: answers that are right, and wrong ones with a word of the hint that they get
NUMBERS = {
    1: (
        ["_lo", " lo", "'_lo'"],
        [("lo", "merge 1"), ("low", "Count each"), ("we", "merge 2"), ("st", "merge 4"), ("258", "an id")],
    ),
    2: (["4", "42 - 38"], [("8", "padding"), ("0", "Packer.pack"), ("7", "longest")]),
    3: (
        ["8 * (4 + 8) * 512**2 + 4 * 4 * 12", "25,166,016"],
        [
            ("8*12*512**2", "small one"),
            ("12*512**2", "All layers"),
            ("109052050", "Depth 8"),
            ("1", "Depth 8"),
            ("8 * (12 * 512**2 + 48)", "has_value_embed"),
        ],
    ),
    4: (
        ["3 * 2048 * 2049 / 2 + 9 * (513 * 514 / 2 + 1535 * 513)"],
        [
            ("3 * 2048 * 2049 / 2 + 9 * (512 * 513 / 2 + 1536 * 512)", "own key"),
            ("12 * 2048 * 2049 / 2", "without windows"),
            ("2048 * (3 * 2048 + 9 * 512)", "first queries"),
            ("2048 * 2049 / 2", "one layer"),
            ("5", "Count a layer"),
        ],
    ),
    5: (
        ["2.3 / 8 / log(2)", "0.415"],
        [
            ("2.3 / 8", "nats per byte"),
            ("4.4 / 8 / log(2)", "bos"),
            ("4.4 / 4 / log(2)", "per token"),
            ("9", "Add the"),
        ],
    ),
    8: (["17"], [("18", "smaller depth"), ("16", "524,288 tokens"), ("2.5", "whole number"), ("0", "whole number")]),
    11: (["27"], [("28", "fewer"), ("26", "p is"), ("20", "not the better"), ("41", "0 to 40")]),
}


def polar(s, coefficients, steps=5):
    for a, b, c in coefficients[:steps]:
        s = a * s + b * s**3 + c * s**5
    return str(s)


def add_computed():
    """Answers that a reader would compute by a loop or from shapes, written out here independently of the checks."""
    from kernels.newton_schulz import POLAR_EXPRESS, QUINTIC

    NUMBERS[7] = (
        [polar(0.003, POLAR_EXPRESS), f"{float(polar(0.003, POLAR_EXPRESS)):.3f}"],
        [
            (polar(0.003, POLAR_EXPRESS, 1), "after 1 of"),
            (polar(0.003, POLAR_EXPRESS, 4), "after 4 of"),
            (polar(0.003, [QUINTIC] * 5), "newton_schulz"),
            ("1", "many steps"),
            ("0.5", "write X"),
        ],
    )
    layers = 12 * 12 * 768**2 + 6 * 6 * 12  # matrices, and the gates of value embeddings
    linears = layers + 32768 * 768 + 24  # the head, and the smear's gate
    attention = 12 * 768 * (3 * 2048 + 9 * 512)
    mfu = (6 * linears + attention) * 478542 / 989e12
    total = 286_261_730
    NUMBERS[9] = (
        [str(100 * mfu), f"{100 * mfu:.1f}%"],
        [
            (str(mfu), "percent"),
            (str(100 * 6 * total * 478542 / 989e12), "looked up"),
            (str(100 * mfu * 435560 / 478542), "launched"),
            ("3", "FLOPs per token"),
        ],
    )
    each, seen = 2 * 2 * 768, 3 * 1000 + 9 * 513
    NUMBERS[10] = (
        [f"3.35e12 / (2 * {linears} + {seen} * {each})"],
        [
            (f"3.35e12 / (2 * {linears})", "weights alone"),
            (f"3.35e12 / (2 * {linears} + 12000 * {each})", "window"),
            (f"3.35e12 / (4 * {linears} + 2 * {seen} * {each})", "float32"),
            (f"3.35e12 / (2 * {total - 74} + {seen} * {each})", "one row"),
            (f"3.35e12 / (2 * {total - 74})", "one row"),
            (f"3.35e12 / (2 * {linears} + {seen} * {each} / 2)", "keys alone"),
            (f"3.35e12 / (2 * {layers} + {seen} * {each})", "The head"),
            ("1042", "Bytes a token"),
        ],
    )
    moved, flops = 2 * 2 * 32768 * 1536 / 3.35e12, 4 * 32768 * 1536 / 989e12
    NUMBERS[13] = (
        [str(100 * moved / 70e-6), "85.8"],
        [
            (str(moved / 70e-6), "percent"),
            (str(100 * flops / 70e-6), "FLOPs"),
            (str(50 * moved / 70e-6), "factor of two"),
            ("60", "Least bytes"),
        ],
    )


add_computed()
ANSWERS = [(i, answer, "") for i in NUMBERS for answer in NUMBERS[i][0]]
ANSWERS += [(i, answer, hint) for i in NUMBERS for answer, hint in NUMBERS[i][1]]


def roofline():
    """Chapter 13's picture, as the benchmarks' page draws it, for a file of its own."""
    from benchmarks import pages
    from nanochat.render import Figure, standing_alone

    result = json.loads((ROOT / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3.json").read_text("utf-8"))
    blocks = [block for section in pages.sections(result) for block in section.blocks]
    figure = next(block for block in blocks if isinstance(block, Figure) and block.title.startswith("Roofline"))
    name = ' xmlns="http://www.w3.org/2000/svg"'  # which it gets again where it stands alone
    return standing_alone(Figure(figure.title, figure.svg.replace(name, "", 1)))


def drawing(svg):
    """Its lines and words; ids are left out, and decimals that another build of matplotlib may round otherwise."""
    root = ElementTree.fromstring(svg)
    paths = [node.get("d") or node.text or "" for node in root.iter() if not node.tag.endswith(("date", "style"))]
    return [re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):.0f}", path) for path in paths]


def test_the_roofline_is_that_of_the_result_file():
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib, which draws it, is not installed")
    kept = (ROOT / "images" / "roofline.svg").read_text("utf-8")
    if f"Matplotlib v{matplotlib.__version__}," not in kept:
        pytest.skip("it was drawn by another version of matplotlib")
    assert drawing(kept) == drawing(roofline()), "write what roofline() gives into images/roofline.svg"


@pytest.mark.parametrize("i, answer, hint", ANSWERS)
def test_answers_are_judged(i, answer, hint):
    found = CHAPTERS[i - 1].check(answer)
    assert bool(found) == bool(hint) and hint in found, found


GRADIENT = """
import torch
def rms_norm_backward(x, dy):
    r = torch.rsqrt(x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps)
    unit = x * r
    return {}
"""
GRADIENTS = [
    ("r * (dy - unit * (dy * unit).mean(-1, keepdim=True))", ""),
    ("r * dy", "constant"),
    ("r * (dy - unit * (dy * unit).sum(-1, keepdim=True))", "mean"),
    ("dy", "relative error"),
    ("(r + 1e-6) * (dy - unit * (dy * unit).mean(-1, keepdim=True))", "eps is 2.2e-16"),
    ("(s := torch.rsqrt(x.square().mean())) * (dy - x * s * (dy * x * s).mean())", "over its C numbers"),
    ("torch.autograd.grad(x.requires_grad_().square().sum(), x)[0]", "does not require grad"),
    ("dy[0]", "wanted dx (37, 100)"),
    ("None", "NoneType"),
    ("dy @ unit", "RuntimeError"),
    ("exit(0)", "It fails: SystemExit: 0, line"),
]


@pytest.mark.parametrize("body, hint", GRADIENTS)
def test_gradients_are_judged(body, hint, tmp_path):
    (tmp_path / "mine.py").write_text(GRADIENT.format(body))
    found = CHAPTERS[5].check(str(tmp_path / "mine.py"))
    assert bool(found) == bool(hint) and hint in found, found
    if hint == "RuntimeError":
        assert "line 6" in found


KERNEL = """
import torch, triton
import triton.language as tl
@triton.jit
def kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < {bound}
    x = tl.load(x_ptr + at, mask=at < N, other=0.0)
    tl.store(y_ptr + at, {value}, mask=mask)
def relu2(x, y):
    kernel[({grid},)](x, y, x.numel(), BLOCK=256)
"""
GRID = "triton.cdiv(x.numel(), 256)"
KERNELS = [
    (dict(), ""),
    (dict(bound="N + 8"), "behind the end"),
    (dict(grid="1"), "never written"),
    (dict(bound="0"), "writes nothing"),
    (dict(value="tl.maximum(x, 0.0)"), "its square"),
    (dict(value="x * x"), "negative"),
    (dict(value="x"), "largest error"),
    (dict(grid="oops"), "NameError"),
]


@needs_triton
@pytest.mark.parametrize("parts, hint", KERNELS)
def test_kernels_are_judged(parts, hint, tmp_path):
    usual = dict(bound="N", value="tl.maximum(x, 0.0) * tl.maximum(x, 0.0)", grid=GRID)
    (tmp_path / "mine.py").write_text(KERNEL.format(**{**usual, **parts}))
    found = CHAPTERS[11].check(str(tmp_path / "mine.py"))
    assert bool(found) == bool(hint) and hint in found, found


@needs_triton
def test_work_that_is_no_kernel_s_is_no_kernel(tmp_path):
    (tmp_path / "mine.py").write_text("def relu2(x, y):\n    y.copy_(x.relu().square())\n")
    assert "no @triton.jit" in CHAPTERS[11].check(str(tmp_path / "mine.py"))


@pytest.mark.parametrize(
    "text, value",
    [("27,000", 27000), ("2**10 + 1", 1025), ("85 %", 85), ("log(e)", 1), ("-3", -3), ("sum(range(2**3))", 28)],
)
def test_numbers_are_read_as_expressions(text, value):
    assert math.isclose(number(text), value)


@pytest.mark.parametrize("text", ["", "x", "1/0", "open('x')", "inf", "1 +", "'a'", "__import__('os')", "9**9**9"])
def test_what_is_not_a_number_is_refused(text):
    with pytest.raises(UserError):
        number(text)


def called(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["learn", *words])
    learn.main()


def test_the_command(monkeypatch, capsys, tmp_path):
    called(monkeypatch)
    assert len(capsys.readouterr().out.splitlines()) == len(CHAPTERS)
    called(monkeypatch, "show", "2")
    shown = capsys.readouterr().out
    assert CHAPTERS[1].question in " ".join(shown.split()) and max(map(len, shown.splitlines())) <= 100
    called(monkeypatch, "read", "2")
    assert "nanochat/data/packing.py:" in capsys.readouterr().out
    called(monkeypatch, "check", "2", "2", "+", "2")
    assert capsys.readouterr().out == "Right.\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("4\n"))
    called(monkeypatch, "check", "2")
    assert " ".join(capsys.readouterr().out.split()) == f"{CHAPTERS[1].question} answer: Right."
    with pytest.raises(SystemExit) as ended:
        called(monkeypatch, "check", "2", "8")
    assert ended.value.code == 1 and "Not yet. That is how much padding" in capsys.readouterr().out
    (tmp_path / "broken.py").write_text("x = 1\nx +\n")
    (tmp_path / "ends.py").write_text("import sys\nsys.exit()\n")
    for words, said in {
        ("check", "2", "x"): "not a number",
        ("check", "99"): "no chapter 99",
        ("show",): "no chapter is named",
        ("show", "2", "4"): "takes no answer",
        ("read", "2", "4"): "read takes no answer",
        ("check", "6", "nowhere.py"): "no file nowhere.py",
        ("check", "6", str(tmp_path / "broken.py")): "line 2",
        ("check", "6", str(tmp_path / "ends.py")): "ends.py does not run: SystemExit, line 2",
        ("check", "6", str(ROOT / "nanochat" / "errors.py")): "defines no function rms_norm_backward",
    }.items():
        with pytest.raises(UserError, match=said):
            called(monkeypatch, *words)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(UserError, match="no answer"):
        called(monkeypatch, "check", "2")


@needs_triton
@pytest.mark.slow
def test_the_command_in_a_process_of_its_own():
    """Exit codes 0, 1 and 2; and chapter 12 without TRITON_INTERPRET in the environment."""
    import os

    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    for words, code in ((["show", "12"], 0), (["check", "8", "16"], 1), (["check", "8", "much"], 2)):
        command = [sys.executable, "-m", "scripts.learn", *words]
        ended = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True)
        assert ended.returncode == code and "Traceback" not in ended.stderr, ended.stderr
