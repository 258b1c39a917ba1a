"""Every flag of every script: its range is declared once, and what lies outside is one sentence and code 2."""

import argparse
import contextlib
import dataclasses
import importlib
import io
import math
import pkgutil
import sys

import pytest
import tiny

import benchmarks
import profiling
import profiling.compiled
import profiling.predicted
import profiling.recorded
import profiling.static
import scripts
from nanochat import flags
from nanochat.chat_stages import ChatFlags
from nanochat.errors import UserError
from nanochat.rl_stage import RLFlags
from profiling.compiled import null_device

CHAT = {"scripts.mid_train": ChatFlags, "scripts.chat_sft": ChatFlags, "scripts.chat_rl": RLFlags}
HUGE = "99999999999999999999"
VALUES = ("-1", "0", "1", "-3", HUGE, "1" * 5000, "1e308", "-0.5", "nan", "inf", "-inf", "", "x", "\udce9",
          "1e3", "1_000", "\uff10", "+1", "0x10", " 1 ", "a" * 5000)  # fmt: skip
NO_SCRIPTS = ("_worker", ".conftest", ".worker", "null_bindings")


def declared():
    """(module, its Flags) of every script."""
    rooms = profiling.recorded, profiling.static, profiling.compiled, profiling.predicted
    for package in (scripts, *rooms, benchmarks):
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if found.name.endswith(NO_SCRIPTS) or ".test_" in found.name:
                continue
            module = importlib.import_module(found.name)
            own = CHAT.get(found.name) or vars(module).get("Flags")
            if own and dataclasses.is_dataclass(own):
                yield found.name, own


SCRIPTS = dict(declared())


def accepted(own, field, value):
    """What the flag's field gets, or None where it is refused with a sentence."""
    try:
        return getattr(flags.parse(own, "", [f"--{field.name.replace('_', '-')}={value}"]), field.name)
    except UserError as error:
        assert f"--{field.name.replace('_', '-')}" in str(error) and "\n" not in str(error)
    return None


def test_there_is_no_script_without_flags_that_are_walked():
    assert len(SCRIPTS) >= 20 and sum(len(dataclasses.fields(own)) for own in SCRIPTS.values()) > 127


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_lies_outside_a_range_is_refused(name):
    for field in dataclasses.fields(SCRIPTS[name]):
        kind, meta = field.metadata["kind"], field.metadata
        if kind is bool:
            continue
        for value in VALUES:
            found = accepted(SCRIPTS[name], field, value)
            if kind is str:
                if not value and meta["needed"] and not meta["choices"]:
                    assert found is None, (field.name, value)
                continue
            least, most = meta["range"]
            if found is not None:
                assert math.isfinite(found) and (least <= found <= most or found in meta["also"]), (field.name, value)
            if value in (HUGE, "nan", "inf", "-inf", "", "x"):
                assert found is None or (value[0] == "9" and field.name == "target_flops"), (field.name, value)
            elif value in ("-1", "0", "1", "-3") and found is None:
                assert not least <= kind(value) <= most and kind(value) not in meta["also"], (field.name, value)
        assert field.default is None or accepted(SCRIPTS[name], field, field.default) == field.default, field.name


WRONG = {
    "chat_eval": ["-b=0", "-x=-3", "-k=-5", "-t=-1", "-n=0", "-m=-1", f"--seed={HUGE}", "-t=nan",
                  "--profile=-1"],
    "chat_cli": ["-t=-1", "-k=-2", "-m=0", "--seed=-1"],
    "chat_web": ["--port=0", "--port=70000", "--slots=0", "-t=inf"],
    "compare": ["--runs=", "--runs=,", "--runs= "],
    "tok_train": ["--vocab-size=264", "--max-chars=0", "--doc-cap=0", "--data="],
    "base_train": ["--depth=0", f"--seed={HUGE}", "--embedding-lr=nan", "--data=",
                   "--target-param-data-ratio=0", "--max-seq-len=1"],
    "plan": ["--depth=0", "--max-minutes=0", "--max-minutes=nan", "--seed=-1", "--data=", "--device=", "--stages=",
             "--stages=,", "--data=/no/where", "--data=nowhere.txt"],
    "infer_bench": ["--batch-sizes=", "--batch-sizes=0", "--batch-sizes=1,,2", "--repeats=0", "--width=100"],
    "launch": ["--gpus=0", "--gpus=-1", f"--gpus={HUGE}"],
}  # fmt: skip


@pytest.mark.parametrize("script", WRONG)
def test_a_script_says_so_in_one_sentence(script, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    for words in WRONG[script]:
        assert tiny.call(script, words, *(["scripts.base_train"] if script == "launch" else [])) == 2, words
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and said.err.count("\n") == 1 and not said.out, (words, said)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--deph=3"], "'--deph=3' is no flag, perhaps --depth is meant; --help lists the flags"),
        (["--dept", "3"], "'--dept' is no flag, perhaps --depth is meant"),
        (["mine"], "'mine' is no flag; --help"),
        (["--zzz"], "'--zzz' is no flag; --help"),
        (["--depth"], "argument --depth: expected one argument; --help"),
        (["--depth=--"], "--depth is '--', which is no value; --help"),
        (["--data=--"], "--data is '--', which is no value; --help"),
        (["--depth="], "argument --depth: invalid int value: ''; --help"),
        (["--depth=1e3"], "argument --depth: invalid int value: '1e3'"),
        (["--no-dry-run=3"], "argument --dry-run/--no-dry-run: ignored explicit argument"),
        (["--depth", "x" * 100_000], "argument --depth: invalid int value: 'xxx"),
    ],
)
def test_a_command_line_that_cannot_be_is_one_short_sentence(words, said):
    with pytest.raises(UserError) as raised:
        flags.parse(SCRIPTS["scripts.plan"], "", words)
    assert str(raised.value).startswith(said) and "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_a_path_after_an_equals_sign_may_begin_with_a_tilde(monkeypatch, tmp_path):
    """A shell leaves it there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    found = 0
    for name, own in SCRIPTS.items():
        for field in dataclasses.fields(own):
            if field.name in ("data", "out", "write", "upstream", "tokenizer", "bundle"):
                value = getattr(flags.parse(own, "", [f"--{field.name}=~/x y"]), field.name)
                assert value == f"{tmp_path}/x y", (name, field.name)
                found += 1
    assert found > 18


@pytest.mark.parametrize("value, said", [("4294967296", "0 to 4294967295"), ("-1", "at least 0"), ("2000000000", "")])
def test_what_is_beyond_an_end_is_told_of_that_end(value, said):
    """`--seed is 4294967296, wanted at least 0` would be no help."""
    if said:
        with pytest.raises(UserError, match=f"--seed is {value}, wanted {said}$"):
            flags.parse(SCRIPTS["scripts.plan"], "", [f"--seed={value}"])
    else:
        assert flags.parse(SCRIPTS["scripts.plan"], "", [f"--seed={value}"]).seed == int(value)


@pytest.mark.parametrize("gpus", ["0", "-1", HUGE, "1" * 5000, "nan", "", "²"])
def test_the_null_device_too(gpus, capsys):
    assert null_device.main(["--gpus", gpus, "kernels"]) == 2 and "--compute" in capsys.readouterr().err


def test_a_number_wants_a_range():
    with pytest.raises(TypeError, match="wants a range"):
        flags.flag(3, "so many")


def test_the_range_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        flags.parse(SCRIPTS["scripts.chat_cli"], "", ["--help"])
    assert "0 to 2" in " ".join(capsys.readouterr().out.split())


def test_scripts_have_no_flags_but_those(monkeypatch):
    """Of numbers that argparse itself reads there are launch's --gpus and tune's --minutes."""
    numbers = []
    plain = argparse.ArgumentParser.add_argument

    def noted(self, *names, **options):
        if options.get("type") in (int, float):
            numbers.append(names[0])
        return plain(self, *names, **options)

    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", noted)
    for name in ("kernels.__main__", "scripts.launch", "profiling.__main__"):
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit):
            importlib.import_module(name).main()
    assert numbers == ["--minutes", "--gpus"]


@pytest.mark.parametrize("word", ["x" * 100_000, "/x" * 50_000])
def test_a_word_without_end_is_cut_in_a_sentence(word, capsys):
    assert tiny.call("chat_eval", f"--run={word}") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --run is ") and "…" in said and said.endswith("two\n") and len(said) < 600


@pytest.mark.parametrize("module", ["/", "scripts.nope", "nope.nope", "..", "", "scripts.base_train.x"])
def test_a_script_that_is_not_there_is_not_launched(module, capsys):
    assert tiny.call("launch", "--gpus=1", module) == 2
    said = capsys.readouterr().err
    assert said == f"error: there is no script {module!r}; wanted one as scripts.base_train\n"
