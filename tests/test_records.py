"""Summaries, plans and other JSON of a run: missing is missing, damaged is an error, and what can be is made again."""

import json
import math

import pytest
import tiny
from test_training import home, train  # noqa: F401 (home is a fixture)

from kernels import measured
from nanochat import complete, measure, plan, records, stages
from nanochat.errors import UserError
from nanochat.plan import throughput
from nanochat.run import Run
from nanochat.tokenizer import Tokenizer
from scripts import chat_eval


def test_what_is_written_comes_back(tmp_path):
    content = dict(a=1, b=[1.5, None], c={"ü": True}, d=float("nan"))
    records.write(tmp_path / "x.json", content)
    assert str(records.read(tmp_path / "x.json", "")) == str(content)
    assert records.read(tmp_path / "y.json", "") is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_object_is_an_error_that_says_what_to_do(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match="x.json is damaged: .*; do this"):
        records.read(tmp_path / "x.json", "do this")


def test_what_memory_does_not_hold_is_damaged(tmp_path):
    for name in (path := tmp_path / "summary.json").name, "manifest.json", "meta.json", "tokenizer.json":
        with open(tmp_path / name, "wb") as f:
            f.truncate(1 << 43)
    with pytest.raises(UserError, match="damaged"):
        records.read(path, "")
    with pytest.raises(UserError, match="damaged"):
        records.rows(path, "")
    with pytest.raises(UserError, match="damaged"):
        Tokenizer.load(tmp_path)
    for name in ("manifest.json", "meta.json"):
        with pytest.raises(complete.Damaged, match=f"{name} is too large"):
            complete.read(tmp_path)
        (tmp_path / "manifest.json").write_text("{}")


def test_every_flipped_bit_of_the_values_is_seen(tmp_path):
    path = tmp_path / "x.json"
    records.write(path, dict(rate=0.25, name="abc", counts=dict(n=10)))
    content, plain = path.read_bytes(), records.read(path, "")
    seen = 0
    for place in range(len(content)):
        for bit in range(8):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            try:
                found = records.read(path, "")
            except UserError:
                seen += 1
                continue
            assert {key: found.get(key) for key in plain} == plain  # a blank, or the checksum's own name
    assert seen > 6 * len(content)


def test_older_files_without_a_checksum_are_checked_for_what_readers_need(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    run = Run.open("a")
    wrong = dict(
        tokenizer=[{}, dict(wanted=7), dict(fingerprint="x")],
        base=[{}, dict(steps=3), dict(stage="mid")],
        eval=[dict(base=3), dict(base={}), dict(chat=[]), dict(chat=dict(sft=3)), dict(chat=dict(sft=dict(x={})))],
    )
    for stage, contents in wrong.items():
        run.stage(stage).mkdir(parents=True)
        for content in contents:
            (run.stage(stage) / "summary.json").write_text(json.dumps(content))
            with pytest.raises(UserError, match="summary.json is damaged: .*delete it"):
                run.summary(stage)


def test_a_summary_lost_to_a_kill_during_the_last_samples_is_made_again(home, monkeypatch, capsys):  # noqa: F811
    assert train(home, "a") == 0
    plain = stages.samples

    def killed(setup):
        raise RuntimeError("killed")

    monkeypatch.setattr(stages, "samples", killed)
    with pytest.raises(RuntimeError, match="killed"):
        train(home, "b")
    assert Run.open("b").summary("base") is None
    half = Run.open("b").stage("base") / ".summary.json.99.tmp"
    half.write_text("{")
    monkeypatch.setattr(stages, "samples", plain)
    assert train(home, "b") == 0 and not half.exists()
    assert "made again from that checkpoint" in capsys.readouterr().out
    one, two = (Run.open(name).summary("base") for name in ("a", "b"))
    assert one.keys() == two.keys() and two["last_session_seconds"] is None
    for summary in (one, two):
        for key in ("training_seconds", "tok_per_s", "last_session_seconds", "peak_memory"):
            summary.pop(key)
    assert one == two
    made = (Run.open("b").stage("base") / "summary.json").stat().st_mtime_ns
    assert train(home, "b") == 0
    assert made == (Run.open("b").stage("base") / "summary.json").stat().st_mtime_ns


def test_a_damaged_summary_is_no_reason_to_train_again(home, capsys):  # noqa: F811
    assert train(home, "a") == 0
    path = Run.open("a").stage("base") / "summary.json"
    path.write_text(path.read_text().replace('"steps": 12', '"steps": 13'))
    for command in ("base_train", "report", "compare"):
        capsys.readouterr()
        runs = ["--runs=a"] if command == "compare" else ["--run=a"]
        code = train(home, "a") if command == "base_train" else tiny.call(command, *runs)
        error = capsys.readouterr().err
        assert code == 2 and error.count("\n") == 1 and "base/summary.json is damaged" in error
        assert "python -m scripts.base_train" in error


TRAINED = dict(
    plan={}, data="d", device="cpu", world=1, dtype="torch.float32", compiled=False, parameters=dict(total=1), steps=1,
    tokens=1, flops=1e3, training_seconds=1.0, tok_per_s=1.0, train_loss=1.0, val_bpb=None, skipped_steps=0,
    peak_memory=0,
)  # fmt: skip


@pytest.mark.parametrize(
    "change, why",
    [
        ({}, ""),
        (dict(kernels=None, samples=["a"], plan=dict(matrix_lr=0.1)), ""),
        (dict(plan=dict(matrix_lr="x")), "plan: matrix_lr is of another type"),
        (dict(tok_per_s=math.inf), "tok_per_s is of another type"),
        (dict(steps=True), "steps is of another type"),
        (dict(samples=[5]), "samples is of another type"),
        (dict(kernels=dict(rows=[dict(group="norms")], when="")), "kernels: rows: 0: on_ms is missing"),
        (dict(parameters={}), "parameters: total is missing"),
    ],
)
def test_what_a_summary_without_a_checksum_lacks(change, why):
    assert records.lacks("base", {**TRAINED, **change}) == why


def test_a_summary_without_all_that_it_once_had_gives_a_report(tmp_path, monkeypatch):
    """The least that is taken: nothing breaks later."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    task = dict(wanted="right", n=1, counts=dict(right=1, wrong=0, refused=0), rate=1.0, low=0.2, high=1.0, examples={})
    summaries = dict(base=TRAINED, tokenizer=dict(wanted=dict(data="d", fingerprint="f"), characters=1, fingerprint="f",
                     vocab_size=9), eval=dict(chat=dict(base=dict(choice=task))))  # fmt: skip
    for stage, content in summaries.items():
        path = tmp_path / "runs" / "a" / stage / "summary.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
    assert tiny.call("report", "--run=a") == 0 == tiny.call("compare", "--runs=a")


def test_the_tokenizer_of_trained_models_is_not_replaced(home, capsys):  # noqa: F811
    data = f"--data={home / 'text.jsonl'}"
    words = ["tok_train", "--run=c", data, "--vocab-size=300"]
    assert tiny.call(*words) == 0
    run = Run.open("c")
    file, summary = (run.stage("tokenizer") / name for name in ("tokenizer.json", "summary.json"))
    content, summarised = file.read_bytes(), summary.read_bytes()

    def refused(*parts):
        assert tiny.call(*words) == 2
        error = capsys.readouterr().err
        assert all(part in error for part in parts) and error.count("\n") == 1
        assert file.read_bytes() == content

    for damaged in (b"", b"{}", summarised[:-40], summarised.replace(b"300", b"301")):
        summary.write_bytes(damaged)
        refused("summary.json is damaged")
    summary.unlink()
    words[-1] = "--vocab-size=310"  # another one, of which the file that is there knows nothing
    refused("summary.json is lost")
    words[-1] = "--vocab-size=300"
    assert tiny.call(*words) == 0 and file.read_bytes() == content
    assert run.summary("tokenizer")["fingerprint"] == run.tokenizer().fingerprint
    file.unlink()
    assert tiny.call(*words) == 0 and file.read_bytes() == content
    assert train(home, "c") == 0
    for more in (["--fresh"], []):  # the trained model would be of no use any more
        assert tiny.call(*words[:-1], "--vocab-size=310", *more) == 2
        assert file.read_bytes() == content
    assert "base was trained with tokenizer" in capsys.readouterr().err
    assert tiny.call(*words, "--fresh") == 0 and file.read_bytes() == content
    tiny.tokenizer(280).save(run.stage("tokenizer"))
    assert tiny.call(*words) == 2 and tiny.call("tok_eval", "--run=c", data) == 2
    assert "not the tokenizer that" in (said := capsys.readouterr().err) and "do not belong together" in said


def test_a_flipped_bit_of_a_merge_is_seen(tmp_path):
    tiny.tokenizer().save(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    merge = json.loads(text)["merges"][280]
    other = merge[:-2] + chr(ord(merge[-2]) ^ 1) + merge[-1] if merge[-1] == "=" else merge[:-1] + "A"
    (tmp_path / "tokenizer.json").write_text(text.replace(f'"{merge}"', f'"{other}"'))
    with pytest.raises(UserError, match="damaged"):
        Tokenizer.load(tmp_path)


def test_an_evaluation_of_one_task_keeps_the_others(home, capsys):  # noqa: F811
    assert train(home, "a") == 0 == train(home, "a", "sft")
    words = ("chat_eval", "--run=a", "-x", "3", "-b", "3", "-m", "2", "-a")
    assert tiny.call(*words, "facts_taught") == 0 == tiny.call(*words, "add_tool")
    run = Run.open("a")
    assert set(run.summary("eval")["chat"]["sft"]) == {"facts_taught", "add_tool"}
    rows = records.rows(run.stage("eval") / "sft_failures.jsonl", "")
    assert {row["task"] for row in rows} == {"facts_taught", "add_tool"}
    before = (run.stage("eval") / "summary.json").read_bytes()
    (run.stage("eval") / "summary.json").write_bytes(before[:-9])
    capsys.readouterr()
    assert tiny.call(*words, "add_tool") == 2
    assert "eval/summary.json is damaged" in capsys.readouterr().err
    assert (run.stage("eval") / "summary.json").read_bytes() == before[:-9]
    (run.stage("eval") / "summary.json").write_bytes(before)
    (run.stage("eval") / "sft_failures.jsonl").write_text("{")
    assert tiny.call(*words, "add_tool") == 2


def test_a_report_says_what_it_has_to_do_without(home, capsys):  # noqa: F811
    assert train(home, "a") == 0
    stage = Run.open("a").stage("base")
    (stage / "summary.json").unlink()
    (stage / "log.jsonl").unlink()
    capsys.readouterr()
    assert tiny.call("report", "--run=a") == 0
    error = capsys.readouterr().err
    for part in ("tok_train makes it again", "base has no summary.json", "log.jsonl has no row of a step"):
        assert part in error


def test_a_report_says_how_many_rows_of_a_log_are_lost(home, capsys):  # noqa: F811
    assert train(home, "a") == 0
    path = Run.open("a").stage("base") / "log.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    assert tiny.call("report", "--run=a") == 0 and "log.jsonl" not in capsys.readouterr().err
    path.write_text("".join([*whole[2:], whole[-2]]))
    assert tiny.call("report", "--run=a") == 0
    assert "log.jsonl has rows of 10 of 12 steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        lambda content: dict(content, config=dict(n_layer=0)),
        lambda content: dict(content, flags=[]),
        lambda content: dict(content, flags={}),
        lambda content: dict(content, rate="fast"),
        lambda content: dict(content, more=1),
        lambda content: {},
    ],
)
def test_a_plan_of_other_types_is_damaged(tmp_path, monkeypatch, change):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(throughput, "speed", lambda *args: (10_000.0, True))
    run = Run.open("r")
    plan.store(plan.make(run, dict(device="cpu")), run)
    content = records.read(run.folder / "plan.json", "")
    records.write(run.folder / "plan.json", change(content))
    with pytest.raises(UserError, match="plan.json is damaged"):
        plan.load(run, {})
    records.write(run.folder / "plan.json", dict(content, run="another"))
    with pytest.raises(UserError, match="the plan of run 'another'"):
        plan.load(run, {})


@pytest.mark.parametrize(
    "content",
    [
        [],
        dict(steps=[]),
        dict(blocks=3),
        dict(blocks=dict(x=3)),
        dict(blocks=dict(x=[dict(dtype="*")])),
        dict(blocks=dict(x=[dict(dtype="*", config=dict(num_warps="4"))])),
        dict(blocks=dict(x=[dict(dtype="*", config={}, up_to="64")])),
    ],
)
def test_measurements_of_other_types_are_made_again(tmp_path, monkeypatch, content):
    monkeypatch.setattr(measured, "path", lambda index: tmp_path / "card.json")
    (tmp_path / "card.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="card.json is not used"):
        assert measured.load(0) == {}


def test_a_damaged_choice_is_measured_again():
    said = []
    whole = dict(setting="auto", rows=[], left=[], blocks={}, card="c", when="2026-01-01")
    assert measure.known(whole, said.append) == whole and measure.known(None, said.append) is None and not said
    for choice in ([], 3, dict(whole, setting=None), {}):
        assert measure.known(choice, said.append) is None
    assert len(said) == 4


ASKED = ("--source=base", "-x", "2", "-b", "2", "-m", "2", "-a", "choice")


def evaluate(home):  # noqa: F811
    return tiny.call("base_eval", "--run=a", f"--data={home / 'text.jsonl'}", "--eval=bpb", "--split-tokens=64")


def test_a_report_is_of_the_models_that_are_there(home, capsys):  # noqa: F811
    run, said = Run.open("a"), "is of another model than the base there now"
    assert train(home, "a") == 0 and evaluate(home) == 0 and tiny.call("chat_eval", "--run=a", *ASKED) == 0
    assert tiny.call("report", "--run=a") == 0
    shown = capsys.readouterr()
    assert said not in shown.err and "choice" in shown.out and "bits per byte of text" in shown.out
    assert train(home, "a", "base", "--fresh", "--seed=7") == 0
    assert tiny.call("report", "--run=a") == 0
    shown = capsys.readouterr()
    assert shown.err.count(said) == 2 and "text of base" in shown.err and "choice of base" in shown.err
    assert "n=2" not in shown.out and "bits per byte of text" not in (run.folder / "report.md").read_text()
    assert evaluate(home) == 0 and tiny.call("report", "--run=a") == 0
    assert capsys.readouterr().err.count(said) == 1


def test_failing_examples_of_two_evaluations_at_once(home, monkeypatch):  # noqa: F811
    assert train(home, "a") == 0
    path, plain = Run.open("a").stage("eval") / "base_failures.jsonl", chat_eval.evaluate

    def meanwhile(*args):  # another process has come to its end
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"task": "facts_taught"}\n{"task": "choice"}\n')
        return plain(*args)

    monkeypatch.setattr(chat_eval, "evaluate", meanwhile)
    assert tiny.call("chat_eval", "--run=a", *ASKED) == 0
    tasks = [row["task"] for row in records.rows(path, "")]
    assert tasks.count("facts_taught") == 1 and set(tasks) <= {"facts_taught", "choice"}
    assert {"task": "choice"} not in records.rows(path, "")
