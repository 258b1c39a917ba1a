"""HumanEval: the canonical solutions pass, and nothing else does, whatever it tries."""

import textwrap
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet as pq
import pytest

from nanochat import humaneval, sandbox
from nanochat.sandbox import exchange, parent

pytestmark = pytest.mark.skipif(bool(parent.missing()), reason=f"cannot isolate here: {parent.missing()}")

# Two problems of our own, in the Hub's columns: they need no data.
OWN = [
    dict(
        task_id="Own/0", entry_point="halves",
        prompt="from typing import List\n\n\ndef twice(x):\n    return 2 * x\n\n\ndef halves(xs: List[int]):\n"
        '    """Half of each, as a list.\n    """\n',
        canonical_solution="    result = []\n    for x in xs:\n        result.append(x / 2)\n    return result\n",
        test="def check(candidate):\n    assert candidate([]) == []\n    xs = [twice(4), 3]\n"
        "    assert candidate(xs) == [4.0, 1.5]\n    assert abs(candidate([1])[0] - 0.5) < 1e-6\n",
    ),
    dict(
        task_id="Own/1", entry_point="describe", prompt='def describe(x, plain=False):\n    """What it is."""\n',
        canonical_solution='    return {"kind": type(x).__name__, "of": (x, {x}, plain)}\n',
        test="def check(candidate):\n    for x in (1, 1.5, True, None, 'é\\ud800', b'x', 1j, (1, (2,)), 1e999):\n"
        "        assert candidate(x) == {'kind': type(x).__name__, 'of': (x, {x}, False)}\n"
        "    assert candidate(0, plain=True)['of'][2] is True\n",
    ),
]  # fmt: skip
SAMPLE = (10, 32, 33, 38, 50, 53, 65, 71, 103, 148, 162)  # helpers, random tests, floats, errors, hashes


@pytest.fixture(scope="module")
def problems(request):
    path = request.config.rootpath.parent / "shared/data/hub/openai/openai_humaneval/openai_humaneval"
    if not path.is_dir():
        pytest.skip("HumanEval does not stand beside the repository, under shared/")
    return pq.read_table(path).to_pylist()


def outcomes(problems, answer, timeout=20.0):
    """{task: why not}, over two processes at a time."""
    with ThreadPoolExecutor(2) as two:
        found = two.map(lambda problem: humaneval.check(problem, answer(problem), timeout), problems)
        return {problem["task_id"]: why for problem, why in zip(problems, found)}


# ---- the right answers, in every shape

SIGNED = lambda problem: problem["prompt"] + problem["canonical_solution"]
SHAPES = {
    "body": lambda p: p["canonical_solution"],
    "body, stripped": lambda p: p["canonical_solution"].strip(),
    "body, without indentation": lambda p: textwrap.dedent(p["canonical_solution"].expandtabs(4)).strip(),
    "body, then prose": lambda p: p["canonical_solution"].rstrip() + "\n\nThis is how the function works.",
    "whole": SIGNED,
    "whole, then prose": lambda p: SIGNED(p).rstrip() + "\n\nIt returns what was asked for: nothing else.",
    "prose, then whole": lambda p: "Sure! Here is the function you asked for:\n\n" + SIGNED(p),
    "fenced": lambda p: f"Here you are:\n\n```python\n{SIGNED(p)}\n```\nHope it helps.",
    "fence of another name": lambda p: f"```py3\n{SIGNED(p)}```",
    "open fence": lambda p: f"Certainly.\n```python\n{SIGNED(p)}",
    "fenced, indented": lambda p: "1. So:\n" + textwrap.indent(f"```python\n{SIGNED(p)}\n```", "   "),
    "fenced body": lambda p: f"```python\n{p['canonical_solution']}\n```",
    "second fence": lambda p: f"First:\n```sh\npip install it\n```\nthen\n```python\n{SIGNED(p)}\n```",
    "without imports and helpers": lambda p: SIGNED(p)[p["prompt"].index("def " + p["entry_point"]) :],
    "with an example behind": lambda p: (
        SIGNED(p) + f"\n\nif __name__ == '__main__':\n    print({p['entry_point']}(1, 2))"
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_right_answers_pass_in_every_shape(shape):
    assert outcomes(OWN, SHAPES[shape]) == {"Own/0": "", "Own/1": ""}


def test_canonical_solutions_pass(problems):
    found = outcomes([problems[i] for i in SAMPLE], SHAPES["body"])
    assert not any(found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_all_canonical_solutions_pass_in_every_shape(problems, shape):
    found = outcomes(problems, SHAPES[shape])
    assert len(found) == 164 and {task: why for task, why in found.items() if why} == {}


def test_an_answer_cut_short_fails_and_breaks_nothing():
    for problem in OWN:
        whole = f"Sure:\n```python\n{SIGNED(problem)}"
        for cut in range(0, len(whole) - 12, 7):
            assert "\n" not in humaneval.program(problem, whole[:cut])[:0]
        assert humaneval.check(problem, whole[: whole.index("def " + problem["entry_point"]) + 20])
        assert humaneval.check(problem, "") and humaneval.check(problem, "I do not know.\n\0 \ud800")


def test_code_is_looked_for_in_short_answers_only():
    begun = humaneval.program(OWN[0], "def halves(xs):\n" + "(" * 50_000)
    assert begun.endswith("((((")
    assert humaneval.check(OWN[0], "def halves(xs):\n    return " + "-" * 15_000 + "1")


# ---- wrong answers: {family: text of an answer}; each defines the function, so that it is the one that is called

LIAR = """
class Liar{base}:
    def yes(self, *others, **named): return True
    for name in "eq ne lt le gt ge bool contains".split(): locals()["__" + name + "__"] = yes
    def same(self, *others): return self
    for name in ("add sub mul truediv floordiv mod pow neg abs pos round radd rsub rmul getitem call enter exit and or "
                 "xor invert rtruediv rmod").split(): locals()["__" + name + "__"] = same
    __getattr__ = same
    __hash__ = lambda self: 0
    __len__ = lambda self: 3
    __float__ = lambda self: 0.0
    __int__ = __index__ = lambda self: 0
    __class__ = property(lambda self: {lie})
def {name}(*positional, **named): return Liar({made})
"""
DEFINED = "\ndef {name}(*positional, **named): return None\n"
FAMILIES = {
    "raises": "def {name}(*positional, **named): raise ValueError('no')",
    "raises the tests' own": "def {name}(*positional, **named): raise AssertionError",
    "stops the iteration": "def {name}(*positional, **named): raise StopIteration('passed')",
    "no code": "The answer is 42.",
    "another name": "def {name}_(x): return x",
    "None": DEFINED,
    "0": "def {name}(*positional, **named): return 0",
    "True": "def {name}(*positional, **named): return True",
    "text": "def {name}(*positional, **named): return 'passed'",
    "an empty list": "def {name}(*positional, **named): return []",
    "NaN": "def {name}(*positional, **named): return float('nan')",
    "a function": "def {name}(*positional, **named): return {name}",
    "a generator": "def {name}(*positional, **named): yield None",
    "its argument": "def {name}(*positional, **named): return positional",
    "os._exit(0)": "import os" + DEFINED + "os._exit(0)",
    "os._exit(0) when called": "import os\ndef {name}(*positional, **named): os._exit(0)",
    "sys.exit(0)": "import sys" + DEFINED + "sys.exit(0)",
    "sys.exit(0) when called": "import sys\ndef {name}(*positional, **named): sys.exit(0)",
    "an exit behind": "import atexit, os\natexit.register(os._exit, 0)" + DEFINED,
    "endless": DEFINED + "while True: pass",
    "endless when called": "def {name}(*positional, **named):\n    while True: pass",
    "asleep": "import time\ndef {name}(*positional, **named): time.sleep(1000)",
    "patched builtins": """
import builtins, math
builtins.abs = math.fabs = builtins.len = builtins.sum = lambda *all: 0
builtins.all = builtins.any = builtins.isinstance = builtins.callable = lambda *all: True
builtins.tuple = builtins.list = builtins.set = builtins.sorted = builtins.round = lambda *all: None
builtins.AssertionError = builtins.Exception = builtins.BaseException = KeyError""" + DEFINED,
    "a patched check": """
import gc, sys, types
def none(candidate): return None
def patch():
    for one in gc.get_objects():
        if isinstance(one, types.FunctionType) and one.__name__ in ("check", "verdict", "__call__", "decode", "encode"):
            one.__code__ = none.__code__ if one.__name__ == "check" else one.__code__
    for module in list(sys.modules.values()):
        if hasattr(module, "check"): module.check = none
patch()
def {name}(*positional, **named): patch()""",
    "the tests read": r'''
import gc, glob, os, re, sys
def texts():
    frame = sys._getframe()
    while frame:
        yield from map(str, [*frame.f_locals.values(), *frame.f_globals.values(), *frame.f_code.co_consts])
        frame = frame.f_back
    for one in gc.get_objects():
        if isinstance(one, (dict, list, tuple)):
            yield from (s for s in (one.values() if isinstance(one, dict) else one) if isinstance(s, str))
    for path in [*glob.glob("/proc/[0-9]*/cmdline"), *glob.glob("/proc/[0-9]*/fd/*"), "/proc/self/mem",
                 *(f"/proc/{{os.getppid() + n}}/fd/{{m}}" for n in range(9) for m in range(30)),
                 *glob.glob("/tmp/**", recursive=True), *(f"/dev/fd/{{n}}" for n in range(30))]:
        try: yield os.read(os.open(path, os.O_RDONLY | os.O_NONBLOCK), 100_000).decode(errors="replace")
        except OSError: pass
def {name}(*positional, **named):
    for text in texts():
        call = re.escape("candidate(" + ", ".join(map(repr, positional)) + ") == ")
        if found := re.search(call + "([^\\n]+)", text): return eval(found[1])
''',
    "a liar": LIAR.format(base="", lie="object", name="{name}", made=""),
    "a lying bool": LIAR.format(base="", lie="bool", name="{name}", made=""),
    "a lying int": LIAR.format(base="(int)", lie="int", name="{name}", made="0"),
    "a lying float": LIAR.format(base="(float)", lie="float", name="{name}", made="0"),
    "a lying text": LIAR.format(base="(str)", lie="str", name="{name}", made="''"),
    "a lying list": LIAR.format(base="(list)", lie="list", name="{name}", made="[None]"),
    "a list of liars": LIAR.format(base="(list)", lie="list", name="{name}", made="[Liar([])] * 3")
    .replace("return Liar([Liar", "return list([Liar"),
    "a lying dict": LIAR.format(base="(dict)", lie="dict", name="{name}", made="{{}}"),
    "a lying tuple": LIAR.format(base="(tuple)", lie="tuple", name="{name}", made="(None,)"),
    "a patched exchange": """
import sys, json
globals_ = sys._getframe(1).f_globals
globals_["encode"] = lambda value: value
json.dumps = globals_["json"].dumps = lambda value: '["passed"]'""" + DEFINED,
    "a forged verdict": """
import os
for n in range(3, 64):
    for text in (b"finished\\n'passed'", b'"passed"\\n', b'["gave", 1]\\n' * 9, b"ready\\n", b"[" * 999 + b"\\n"):
        try: os.write(n, text)
        except OSError: pass""" + DEFINED,
    "nonsense for an answer": """
import os
def {name}(*positional, **named):
    for n in range(3, 64):
        try: os.write(n, b'["gave", ["dict", [["list"], 1]]]\\n\\xff\\n["gave"]\\n{{}}\\n')
        except OSError: pass""",
    "an answer without end": """
import os
def {name}(*positional, **named):
    while True:
        for n in range(4, 64):
            try: os.write(n, b"9" * 4096)
            except OSError: pass""",
}  # fmt: skip
ENDLESS = ("endless", "endless when called", "asleep", "an answer without end")


def broken(family):
    return lambda problem: FAMILIES[family].format(name=problem["entry_point"])


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_answers_fail(family):
    found = outcomes(OWN[:1], broken(family), 0.3 if family in ENDLESS else 20.0)
    assert all(found.values()) and all(why.isprintable() for why in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_all_wrong_answers_fail(problems, family):
    found = outcomes(problems, broken(family), 0.3 if family in ENDLESS else 20.0)
    assert len(found) == 164 and {task: why for task, why in found.items() if not why} == {}


@pytest.mark.slow
def test_in_the_process_of_the_tests_liars_would_pass(problems):
    """Why there are two processes."""
    passed = 0
    for problem in problems:
        answer = broken("a liar")(problem)
        source = f"{problem['prompt']}    pass\n{answer}\n{problem['test']}\ncheck({problem['entry_point']})"
        passed += sandbox.run(source, 20.0).outcome == "finished"
    assert passed > 120


@pytest.mark.parametrize(
    "family, why",
    [
        ("raises", "halves([]) raised ValueError: no"), ("None", "wrong: halves([]) gave None"),
        ("os._exit(0)", "it ended before its last line"), ("sys.exit(0) when called", "SystemExit: 0"),
        ("endless", "timeout after "), ("another name", "wrong: halves([]) gave None"),
        ("a liar", "halves([]) raised TypeError: Liar is no plain value"),
        ("an answer without end", "output limit"),
    ],
)  # fmt: skip
def test_it_says_why(family, why):
    said = humaneval.check(OWN[0], broken(family)(OWN[0]), 0.3 if family == "endless" else 20.0)
    assert said == why or (family == "endless" and said.startswith(why))


# ---- what crosses


@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 0, 10**40, -1.5, -0.0, float("inf"), 1 + 2j, "", "é\ud800\0", b"\0\xff", [], [[1], (2,)],
        (), {1, 2}, frozenset(("a",)), {"a": {1: None}, (1, 2): []}, range(3), {True: 0.1},
    ],
)  # fmt: skip
def test_plain_values_arrive_as_they_were(value):
    import json

    found = exchange.decode(json.loads(json.dumps(exchange.encode(value))))
    assert repr(found) == repr(value) and type(found) is type(value)


def test_subclasses_arrive_as_their_base():
    from collections import Counter, OrderedDict
    from enum import IntEnum

    class Sly(int):
        __add__ = __int__ = __index__ = __eq__ = lambda self, *others: 7

    for value, plain in ((Counter("aab"), {"a": 2, "b": 1}), (OrderedDict(a=1), {"a": 1}), (Sly(3), 3),
                         (IntEnum("E", "a").a, 1), (bytearray(b"x"), b"x")):  # fmt: skip
        found = exchange.decode(exchange.encode(value))
        assert type(found) is type(plain) and found == plain
    assert list(exchange.decode(exchange.encode(map(str, [1])))) == ["1"]


@pytest.mark.parametrize("tree", [{}, [1], ["eval", "1"], ["set", ["list"]], ["complex", "1", 2], ["dict", 1]])
def test_nothing_else_is_understood(tree):
    with pytest.raises((ValueError, TypeError)):
        exchange.decode(tree)
