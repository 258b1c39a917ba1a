"""log.jsonl: one row a step and one a validation, whatever happened to the file."""

import json
import os

import pytest
from test_training import assert_same, home, interrupted_at, train  # noqa: F401 (home is a fixture)

from nanochat.errors import EXIT_INTERRUPTED
from nanochat.log import LOG, json_log, read_log
from nanochat.run import Run


def rows(steps, evaluated=()):
    made = [dict(step=step, loss=0.5) for step in steps] + [dict(step=step, val_bpb=1.0) for step in evaluated]
    return sorted(made, key=lambda row: (row["step"], "val_bpb" in row))


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


GOOD = rows(range(1, 7), (4,))
DAMAGES = {
    "whole": (lines(GOOD), GOOD, []),
    "rows beyond": (lines([*GOOD, *rows((7, 8), (8,))]), GOOD, []),
    "its last row was cut off": (lines(GOOD) + b'{"step": 7, "lo', GOOD, []),
    "a validation that is made again": (lines([*GOOD, dict(step=6, val_bpb=2.0)]), GOOD, []),
    "rows twice": (lines([*GOOD[:3], *GOOD]), GOOD, []),
    "a half line": (
        lines(GOOD[:2]) + b'{"step": 3, "lo\n' + lines(GOOD[3:]),
        [*GOOD[:2], *GOOD[3:]],
        ["1 of 6"],
    ),
    "no JSON between": (lines(GOOD[:2]) + b"warning!\n" + lines(GOOD[2:]), GOOD, ["had 1 damaged"]),
    "JSON of another kind": (lines(GOOD[:2]) + b"[1]\n3\n{}\n" + lines(GOOD[2:]), GOOD, ["had 3 damaged"]),
    "a step that is none": (lines([dict(step="2", loss=1.0), *GOOD]), GOOD, ["had 1 damaged"]),
    "values that are not numbers": (
        lines(GOOD[:2]) + b'{"step": 3, "loss": "2"}\n{"step": 3, "loss": 2, "smooth_loss": null}\n' + lines(GOOD[3:]),
        [*GOOD[:2], *GOOD[3:]],
        ["1 of 6", "had 2 damaged"],
    ),
    "too deep": (lines(GOOD) + b"[" * 200_000 + b"\n", GOOD, ["had 1 damaged"]),
    "zeros": (lines(GOOD[:2]) + b"\0" * 40 + b"\n" + lines(GOOD[3:]), [*GOOD[:2], *GOOD[3:]], ["1 of 6", "1 damaged"]),
    "no text": (lines(GOOD[:6]) + b"\xff\xfe\n", GOOD[:6], ["1 of 6 steps", "1 damaged"]),
    "steps and a validation lost": (lines(GOOD[:3]), GOOD[:3], ["3 of 6 steps and of 1 of 1 validations"]),
    "empty": (b"", [], ["6 of 6 steps"]),
    "missing": (None, [], ["6 of 6 steps"]),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_it_is_put_in_order_and_what_is_missing_is_said(tmp_path, kind):
    content, kept, messages = DAMAGES[kind]
    path, said = tmp_path / LOG, []
    if content is not None:
        path.write_bytes(content)
    write = json_log(path, 6, 4, 1, said.append)
    assert read_log(path) == kept
    assert all(part in " ".join(said) for part in messages) and bool(said) == bool(messages)
    write(dict(step=7, loss=0.1))
    assert read_log(path) == [*kept, dict(step=7, loss=0.1)] and path.read_bytes().endswith(b"}\n")


def test_a_reader_is_told_of_damage_but_not_of_a_row_that_is_being_written(tmp_path, capsys):
    path = tmp_path / LOG
    path.write_bytes(lines(GOOD) + b'{"step": 7')
    assert read_log(path) == GOOD and capsys.readouterr().err == ""
    path.write_bytes(lines(GOOD[:2]) + b"\xff\n" + lines(GOOD[2:]))
    assert read_log(path) == GOOD and "1 damaged lines" in capsys.readouterr().err
    assert read_log(tmp_path / "none") == []


def test_a_log_that_is_removed_while_training_goes_on_is_said_once(tmp_path):
    said = []
    write = json_log(tmp_path / LOG, 0, -1, 0, said.append)
    write(GOOD[0])
    (tmp_path / LOG).unlink()
    for row in GOOD[1:3]:
        write(row)
    assert read_log(tmp_path / LOG) == GOOD[1:3]
    assert len(said) == 1 and "removed or emptied" in said[0] and "step 2" in said[0]


def test_a_new_stage_begins_an_empty_one(tmp_path):
    (tmp_path / LOG).write_bytes(lines(GOOD))
    json_log(tmp_path / LOG, 0, -1, 0, pytest.fail)
    assert (tmp_path / LOG).read_bytes() == b""


def test_a_resumed_stage_says_what_its_log_lost_and_goes_on(home, monkeypatch, capsys):  # noqa: F811
    assert train(home, "a") == 0
    with interrupted_at(monkeypatch, 6):
        assert train(home, "b") == EXIT_INTERRUPTED
    path = Run.open("b").stage("base") / LOG
    whole = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*whole[:1], whole[1][:9], *whole[2:3], *whole[5:]]) + b'{"step": 7, "loss"')
    capsys.readouterr()
    assert train(home, "b") == 0
    said = capsys.readouterr().out
    assert "no row of 2 of 6 steps and of 1 of 1 validations" in said and "had 1 damaged lines" in said
    kept = read_log(path)
    assert [row["step"] for row in kept if "loss" in row] == [1, 3, *range(5, 13)]
    assert [row["step"] for row in kept if "val_bpb" in row] == [8, 12]


def test_killed_in_the_middle_of_a_row_it_is_as_if_it_never_was(home, monkeypatch):  # noqa: F811
    assert train(home, "a") == 0
    with interrupted_at(monkeypatch, 6):
        assert train(home, "b") == EXIT_INTERRUPTED
    with open(Run.open("b").stage("base") / LOG, "a") as f:
        f.write('{"step": 7, "loss": 3.')
    assert train(home, "b") == 0
    assert_same("base")


def test_rows_are_on_disk_before_the_checkpoint_of_their_step_is_complete(home, monkeypatch):  # noqa: F811
    order, plain = [], os.fsync

    def noted(descriptor):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        order.append(name)
        plain(descriptor)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("which file a descriptor is of is not known here")
    monkeypatch.setattr(os, "fsync", noted)
    assert train(home, "a") == 0
    relevant = [name for name in order if name == LOG or name.startswith(".manifest.json")]
    assert len(relevant) > 10 and all(pair[0] == LOG for pair in zip(relevant[::2], relevant[1::2]))
    assert all(pair[1] != LOG for pair in zip(relevant[::2], relevant[1::2]))
