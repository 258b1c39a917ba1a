import json
import shlex
import subprocess

import pytest
import tiny

from nanochat import hardware, plan
from nanochat.errors import UserError
from nanochat.run import Run


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "home"))
    monkeypatch.delenv("NANOCHAT_HUB_ROOT", raising=False)
    monkeypatch.setattr(plan, "speed", lambda *args: (10_000.0, True))
    monkeypatch.setattr(hardware, "has_mps", lambda: False)
    return Run.open("r")


def test_a_cpu_gets_the_small_preset_on_embedded_data(run):
    made = plan.make(run, dict(device="cpu"))
    assert (made.data, made.gpus, made.config["n_layer"]) == ("embedded", 1, 4)
    assert set(made.steps) == set(made.seconds) == {"base", "mid", "sft"}


def test_a_time_limit_shortens_all_training_alike(run):
    whole = plan.make(run, dict(device="cpu", max_minutes=1000.0))
    short = plan.make(run, dict(device="cpu", max_minutes=4.0))
    shares = [short.steps[stage] / whole.steps[stage] for stage in whole.steps]
    assert max(shares) - min(shares) < 0.05 and max(shares) < 1
    predicted = sum(short.seconds.values()) + plan.OTHER_SECONDS
    assert predicted <= 4.0 * 60
    assert short.flags["base"]["num_iterations"] == short.steps["base"]
    with pytest.raises(UserError, match="leaves no time to train"):
        plan.make(run, dict(device="cpu", max_minutes=0.5))


@pytest.mark.parametrize(
    "asked, complaint", [(dict(depth=0), "--depth is 0"), (dict(max_minutes=-1.0), "--max-minutes")]
)
def test_impossible_wishes(run, asked, complaint):
    with pytest.raises(UserError, match=complaint):
        plan.make(run, dict(asked, device="cpu"))


def test_a_stored_plan_is_gone_on_with_and_other_flags_are_refused(run):
    made = plan.make(run, dict(device="cpu", depth=3))
    plan.store(made, run)
    assert plan.load(run, {}) == made == plan.load(run, dict(depth=3))
    with pytest.raises(UserError, match="planned with --depth 3, not 4"):
        plan.load(run, dict(depth=4))
    with pytest.raises(UserError, match="--max-minutes unset"):
        plan.load(run, dict(max_minutes=3.0))
    (run.folder / "plan.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        plan.load(run, {})


def test_a_folder_of_your_own_may_hold_conversations(run, tmp_path):
    (tmp_path / "mine" / "base").mkdir(parents=True)
    (tmp_path / "mine" / "chat").mkdir()
    made = plan.make(run, dict(device="cpu", data=str(tmp_path / "mine")))
    data = {stage: flags["data"] for stage, flags in made.flags.items()}
    mine = tmp_path / "mine"
    assert data == dict(
        tokenizer=str(mine / "base"), base=str(mine / "base"), mid=str(mine / "chat"), sft=str(mine / "chat")
    )


def test_the_shell_reads_what_was_written(run):
    made = plan.make(run, dict(device="cpu"))
    made.flags["base"]["data"] = "a path/with $(odd) 'signs'"
    text = plan.shell(made, run, ["base", "sft"], fresh=True)
    script = text + 'printf "%s\\n" "${BASE[@]}" -- "${STAGES[@]}" -- "${MID[@]}"'
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    base, stages, mid = (part.split("\n") for part in said.strip().split("\n--\n"))
    assert "--data=a path/with $(odd) 'signs'" in base and base[-1] == "--fresh"
    assert stages == ["base", "sft"] and "--fresh" not in mid
    assert shlex.quote(made.run) in text


def test_a_full_disk_is_seen_before_anything_begins(run, monkeypatch):
    made = plan.make(run, dict(device="cpu"))
    made.disk = 10**18
    with pytest.raises(UserError, match="needs about 1000000000.0"):
        plan.check(made, run, ["base"])


def test_a_dry_run_writes_nothing(run, capsys):
    assert tiny.call("plan", "--run=r", "--device=cpu", "--dry-run") == 0
    shown = capsys.readouterr().out
    for word in ("machine", "model", "tokenizer", "base", "mid", "sft", "eval", "report", "time", "disk"):
        assert f"\n  {word}" in shown
    assert not run.folder.exists()


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--stages=base,swim"], "--stages names 'swim'"),
        (["--run=a/b"], "--run is"),
        (["--data=/none"], "does not exist"),
        (["--device=gpu"], "--device-type is 'gpu'"),
    ],
)
def test_wrong_use(run, capsys, flags, complaint):
    assert tiny.call("plan", *flags) == 2
    assert complaint in capsys.readouterr().err
    assert not run.folder.exists()


def test_fresh_for_all_stages_makes_a_new_plan(run):
    plan.store(plan.make(run, dict(device="cpu", depth=3)), run)
    assert tiny.call("plan", "--run=r", "--device=cpu", "--depth=2", "--fresh") == 0
    assert json.loads((run.folder / "plan.json").read_text())["config"]["n_layer"] == 2
