import json
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import hub_fixture
import pytest
import standins
import tiny

import scripts.plan
from nanochat import cadence, hardware, measure, plan, presets, rl_size, sandbox, toolchain
from nanochat.chat_stages import ChatFlags
from nanochat.cost import flops_per_token
from nanochat.data import hub
from nanochat.errors import UserError
from nanochat.flags import parse
from nanochat.gpt import GPTConfig
from nanochat.plan import decide, room, throughput
from nanochat.plan.decide import OTHER_SECONDS
from nanochat.presets import predicted
from nanochat.recipe import horizon
from nanochat.rl_stage import RLFlags
from nanochat.run import Run
from scripts import base_eval, base_train, chat_eval, tok_train

SPEED = throughput.speed


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "home"))
    monkeypatch.delenv("NANOCHAT_HUB_ROOT", raising=False)
    monkeypatch.setattr(throughput, "speed", lambda *args: (10_000.0, True))
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
    predicted = sum(short.seconds.values()) + OTHER_SECONDS
    assert predicted <= 4.0 * 60
    assert short.flags["base"]["num_iterations"] == short.steps["base"]
    with pytest.raises(UserError, match="leaves no time to train"):
        plan.make(run, dict(device="cpu", max_minutes=0.5))


def test_hub_data_leaves_time_for_a_sample_of_every_evaluation(run, tmp_path, monkeypatch, capsys):
    hub_fixture.gsm8k(tmp_path / "hub", "test", 3)
    monkeypatch.setenv("NANOCHAT_HUB_ROOT", str(tmp_path / "hub"))
    made = plan.make(run, dict(device="cpu", data="hub", max_minutes=10.0))
    assert made.evaluation == 0.12 * 600
    assert sum(made.seconds.values()) + OTHER_SECONDS + made.evaluation <= 600
    lines = plan.shell(made, run, ["eval"], False).splitlines()
    core, chat = (next(line for line in lines if line.startswith(name)) for name in ("CORE=", "CHAT="))
    plan.show(made, run, ["eval"])
    assert "of each of CORE's tasks" in capsys.readouterr().out
    assert core.startswith("CORE=(--eval=core --max-per-task=")
    assert chat.startswith("CHAT=(--tasks=gsm8k,spellingbee --max-problems=")
    hub_fixture.write(tmp_path / "hub", "openai/openai_humaneval", "openai_humaneval", "test", [dict(prompt="")])
    for lacks, said in (
        ("", "gsm8k, humaneval, spellingbee"),
        ("Landlock", "not HumanEval, whose programs cannot be"),
    ):
        monkeypatch.setattr(sandbox, "missing", lambda lacks=lacks: lacks)
        plan.show(made, run, ["eval"])
        assert said in (shown := capsys.readouterr().out) and ("this system lacks Landlock" in shown) == bool(lacks)


def test_other_data_is_evaluated_as_before(run, tmp_path):
    made = plan.make(run, dict(device="cpu"))
    assert made.evaluation == 0
    assert plan.shell(made, run, [], False).endswith("CORE=()\nCHAT=(--max-new-tokens=32)\n")
    made.flags["sft"]["data"] = "a path"
    assert plan.shell(made, run, [], False).endswith("CORE=()\nCHAT=()\n")


def overheads(made, config):
    """Of each stage, computed from the flags that its script gets."""
    size = cadence.checkpoint_bytes(config)
    return {
        stage: cadence.overhead(made.flags[stage], made.steps.get(stage), made.batch, made.rate, size, made.device)
        for stage in ("base", "mid", "sft")
    }


@pytest.mark.parametrize("rate", [300.0, 3_000.0, 14_000.0, 30_000.0])
def test_validating_and_saving_takes_less_than_3_percent_of_the_small_preset(run, monkeypatch, rate):
    monkeypatch.setattr(throughput, "speed", lambda *args: (rate, True))
    made = plan.make(run, dict(device="cpu", max_minutes=1e6))
    assert max(overheads(made, GPTConfig(**made.config)).values()) < 0.03
    assert made.flags["base"]["eval_tokens"] == 2**16 and made.flags["sft"]["eval_tokens"] == 2**15


def test_a_time_limit_leaves_the_last_validation_as_it_is(run):
    flags = plan.make(run, dict(device="cpu", max_minutes=3.0)).flags
    assert flags["base"]["eval_tokens"] == 2**16 and flags["mid"]["eval_tokens"] == 2**15


def gpu_plan(gb, gpus, peak, depth=None):
    """A plan of a preset for GPUs, made as `make` does, which needs to see one."""
    preset = presets.gpu(gb, gpus, depth)
    config = preset.config()
    length = horizon(config, 0.28, float(preset.base["target_param_data_ratio"]))
    flags = {stage: dict(getattr(preset, stage)) for stage in ("base", "mid", "sft")}
    rate = gpus * peak * 1e12 * throughput.ASSUMED_MFU / flops_per_token(config)
    steps = dict(base=length.num_iterations)
    made = plan.Plan("r", {}, "cuda", "", gpus, "hub", [], flags, {}, length.total_batch_size, steps, rate=rate)
    decide.set_last(made)
    decide.set_cadence(made, config)
    return made, config


@pytest.mark.parametrize("gb", [size.memory for size in presets.SIZES])
@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize("peak", [50, 200, 400])
def test_validating_and_saving_takes_less_than_3_percent_of_every_preset(gb, gpus, peak):
    made, config = gpu_plan(gb, gpus, 5 * peak if gb >= 79 else peak)
    assert max(overheads(made, config).values()) < 0.03
    assert made.flags["base"]["eval_every"] > 0  # and there are some in between


def test_the_cadence_of_the_speedrun_on_eight_h100():
    """As much text at the end as nanochat validates on, a quarter of it in between; saved every 250 steps."""
    made, config = gpu_plan(79.1, 8, 989)
    flags = made.flags["base"]
    assert config.n_layer == 24
    assert flags["eval_tokens"] == 80 * 524288 and flags["eval_tokens_between"] == 20 * 524288
    assert flags["eval_every"] == flags["save_every"] == 250
    assert overheads(made, config)["base"] < 0.03
    made.flags["base"] = dict(flags, eval_tokens_between=flags["eval_tokens"])
    assert overheads(made, config)["base"] > 0.05  # what it was before


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
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**6))
    with pytest.raises(UserError, match=f"has 0.0 GB free and this run needs about {made.disk / 1e9:.1f}"):
        plan.check(made, run, ["mid"])


@pytest.mark.parametrize("elsewhere", [False, True])
def test_downloaded_text_is_not_asked_for_again(run, monkeypatch, tmp_path, elsewhere):
    """A run for which there was just room, killed after its downloads, goes on."""
    monkeypatch.setattr(hub, "reachable", lambda: (True, "the Hub answers"))
    made = plan.make(run, dict(device="cpu", data="hub"))
    (cache := tmp_path / "cache").mkdir()
    monkeypatch.setattr(hub, "cache", lambda: cache)
    stat, free = Path.stat, {False: made.disk - room.SHARD * room.shards(made), True: 0}
    there = SimpleNamespace(st_dev=-1)
    monkeypatch.setattr(Path, "stat", lambda path, **more: there if elsewhere and path == cache else stat(path, **more))
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[folder == cache]))
    monkeypatch.setattr(hub, "to_download", lambda shards: 0)
    plan.check(made, run, ["base"])
    monkeypatch.setattr(hub, "to_download", lambda shards: shards + 1)
    plan.check(made, run, ["mid"])  # which reads no such text
    with pytest.raises(UserError, match="HF_HUB_CACHE" if elsewhere else "NANOCHAT_BASE_DIR"):
        plan.check(made, run, ["base"])
    free[elsewhere] += room.SHARD * (room.shards(made) + 1)
    plan.check(made, run, ["base"])


def test_the_hubs_cache_is_looked_at_only_for_what_is_downloaded(run, monkeypatch):
    """It may be in a home that there is not."""
    monkeypatch.setattr(hub, "cache", None)
    plan.check(plan.make(run, dict(device="cpu")), run, list(plan.STAGES))


def test_a_full_disk_is_seen_before_the_speed_is_measured(run, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "speed", SPEED)
    monkeypatch.setattr(throughput, "step_seconds", lambda *args: pytest.fail("it was measured"))
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**6))
    assert tiny.call("plan", "--run=r", "--device=cpu") == 2
    assert "has 0.0 GB free and this run needs about" in capsys.readouterr().err


def test_what_a_run_has_already_needs_no_room_again(run, monkeypatch):
    made = plan.make(run, dict(device="cpu"))
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: SimpleNamespace(free=made.disk - 1000))
    with pytest.raises(UserError, match="free some"):
        plan.check(made, run, ["base"])
    run.stage("base").mkdir(parents=True)
    (run.stage("base") / "x").write_bytes(bytes(1000))
    plan.check(made, run, ["base"])


def test_a_dry_run_writes_nothing(run, capsys):
    assert tiny.call("plan", "--run=r", "--device=cpu", "--dry-run") == 0
    shown = capsys.readouterr().out
    for word in ("machine", "model", "tokenizer", "base", "mid", "sft", "eval", "report", "time", "validate", "disk"):
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


# ---- GPUs, of which torch tells what they would tell


@pytest.fixture
def gpus(run, monkeypatch):
    """gpus("H100", …): these cards, the Hub, a compiler."""
    monkeypatch.setattr(throughput, "speed", SPEED)
    for name in ("NANOCHAT_DTYPE", "NANOCHAT_KERNELS", "TORCH_COMPILE_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "reachable", lambda: (True, "the Hub answers"))
    monkeypatch.setattr(toolchain, "obstacle", lambda: "")
    return lambda *cards: standins.gpus(monkeypatch, *cards)


@pytest.mark.parametrize(
    "cards, count, preset, depth, dtype",
    [
        (["H100"], 1, "79.1 GiB", 20, "bfloat16"),
        (["H100"] * 8, 8, "79.1 GiB", 24, "bfloat16"),
        (["H200"] * 8, 8, "139.5 GiB", 24, "bfloat16"),
        (["L40S"] * 8, 8, "44.4 GiB", 24, "bfloat16"),
        (["A100-40"] * 8, 8, "39.4 GiB", 24, "bfloat16"),
        (["H100"] * 3, 2, "79.1 GiB", 20, "bfloat16"),
        (["4090", "GTX 1050"], 1, "23.5 GiB", 12, "bfloat16"),
        (["4090"], 1, "23.5 GiB", 12, "bfloat16"),
        (["3090"], 1, "23.5 GiB", 12, "bfloat16"),
        (["5090"], 1, "31.4 GiB", 16, "bfloat16"),
        (["L4"], 1, "22 GiB", 12, "bfloat16"),
        (["T4"], 1, "14.6 GiB", 12, "float16"),
        (["MI300X"], 1, "191.5 GiB", 20, "bfloat16"),
    ],
)
def test_a_known_gpu(run, gpus, capsys, cards, count, preset, depth, dtype):
    gpus(*cards)
    made = plan.make(run, {})
    assert (made.device, made.data, made.gpus, made.measured) == ("cuda", "hub", count, False)
    config, rows = GPTConfig(**made.config), made.flags["base"]["device_batch_size"]
    assert config.n_layer == made.flags["base"]["depth"] == depth
    name, _, memory = standins.CARDS[cards[0]]
    assert predicted(config, rows, count, dtype) < 0.9 * memory
    assert made.batch % (rows * config.sequence_len * count) == 0
    assert made.rate == pytest.approx(
        0.4 * count * hardware.PEAKS[name].bf16 * 1e12 / flops_per_token(config)
    )  # predicted, and said so
    plan.show(made, run, list(plan.STAGES))
    shown = capsys.readouterr().out
    for words in (f"{count} x {name}", f"preset    {preset}", f"dtype     {dtype}", "% of its ",
                  "for base and rl", "predicted, at 40% of the peak"):  # fmt: skip
        assert words in shown
    assert ("  gpus      " in shown) == (count < len(cards))


def gone_on_with(run, gpus, cards, capsys):
    """(what a second call of speedrun.sh gets for its shell, and prints) where so many cards are there."""
    gpus(*cards)
    text = scripts.plan.here(scripts.plan.Flags(run=run.name))
    return text, capsys.readouterr().out


def test_a_stored_plan_goes_on_with_fewer_gpus(run, gpus, capsys, monkeypatch):
    """Or each rank without a card would end with a sentence."""
    monkeypatch.setattr(decide, "need_room", lambda *of: None)
    first, shown = gone_on_with(run, gpus, ["H100"] * 9, capsys)
    assert "\nGPUS=8\n" in first and "gpus      8 of 9, a power of two\n" in shown
    made = plan.load(run, {})
    text, shown = gone_on_with(run, gpus, ["H100"] * 3, capsys)
    assert text == first.replace("GPUS=8", "GPUS=2") and "gpus      2; it was planned for 8\n" in shown
    assert shown.count("  gpus  ") == 1 and "card  " not in shown
    plan.on_this_machine(there := plan.load(run, {}))
    assert there.rate == made.rate / 4 and there.seconds["base"] == 4 * made.seconds["base"]
    assert gone_on_with(run, gpus, ["H100"] * 9, capsys)[0] == first  # what is stored stays
    plan.on_this_machine(there := plan.load(run, {}), nodes=2)
    assert replace(there, reasons=sorted(there.reasons)) == replace(made, reasons=sorted(made.reasons))  # and more
    made.gpus, made.nodes = 4, 2
    plan.on_this_machine(made)
    assert made.gpus == 8  # on one machine as many as on two


@pytest.mark.parametrize(
    "depth, card, count, nodes, rows",
    [(34, "H100", 4, 1, 8), (34, "H100", 2, 2, 8), (34, "H100", 2, 1, 4), (40, "H100", 2, 1, 1),
     (24, "A100-40", 8, 1, 8), (24, "A100-40", 8, 2, 8), (24, "H100", 8, 1, 16)],
)  # fmt: skip
def test_a_stored_plan_has_as_many_rows_as_fit_here(run, gpus, monkeypatch, depth, card, count, nodes, rows):
    """The optimizer's state is shared out among fewer, or they have less memory."""
    monkeypatch.setattr(decide, "need_room", lambda *of: None)
    gpus(*["H100"] * 8)
    made = plan.make(run, dict(depth=depth, max_minutes=600.0))
    plan.store(made, run)
    gpus(*[card] * count)
    flags = replace(scripts.plan.Flags(), run=run.name, nodes=nodes)
    there, _ = scripts.plan.decide(flags, run, ["base"], {})
    config, before = GPTConfig(**made.config), int(made.flags["base"]["device_batch_size"])
    name, _, memory = standins.CARDS[card]
    fits = predicted(config, rows, count * nodes, "bfloat16")
    assert fits < memory and (rows == 1 or fits < 0.9 * memory)
    assert before == rows or predicted(config, 2 * rows, count * nodes, "bfloat16") > 0.9 * memory
    assert all(there.flags[stage].get("device_batch_size", rows) == rows for stage in ("base", "mid", "sft", "rl"))
    assert (there.device_name, there.memory) == (name, int(memory * 2**30))
    fewer = f"gpus: {count * nodes}; it was planned for 8, and may take longer than --max-minutes"
    assert (fewer in there.reasons) == (count * nodes < 8)
    other = "card: its times are those of the NVIDIA H100 80GB HBM3 that it was planned for"
    assert (other in there.reasons) == (card != "H100")


def test_a_stored_plan_is_held_against_the_dtype_of_the_card_that_is_here(run, gpus):
    gpus("3090")
    plan.store(plan.make(run, {}), run)
    gpus("T4")
    plan.on_this_machine(there := plan.load(run, {}))
    rows = int(there.flags["base"]["device_batch_size"])
    assert there.dtype == "float16" and [reason for reason in there.reasons if "bfloat16 matrix units" in reason] == []
    assert predicted(GPTConfig(**there.config), rows, 1, "float16") < 0.9 * 14.6


def test_on_too_small_gpus_a_run_is_not_gone_on_with(run, gpus):
    gpus(*["H100"] * 8)
    plan.store(plan.make(run, dict(depth=40)), run)
    gpus("4090")
    words = r"planned for 8 x NVIDIA H100 80GB HBM3; with 1 x NVIDIA GeForce RTX 4090 it needs \d+\.\d GiB a GPU for a"
    with pytest.raises(UserError, match=words):
        plan.on_this_machine(plan.load(run, {}))


def test_an_unknown_gpu_is_planned_from_steps_of_a_shallow_model(run, gpus, capsys, monkeypatch):
    gpus(*["unknown"] * 2)
    measured = []
    monkeypatch.setattr(
        throughput, "step_seconds", lambda machine, config, rows: measured.append((config, rows)) or 0.5
    )
    made = plan.make(run, {})
    [(tried, rows)] = measured
    config = GPTConfig(**made.config)
    assert (tried.n_layer, tried.n_embd, config.n_layer, rows) == (throughput.MEASURED_LAYERS, config.n_embd, 16, 16)
    per_second = 2 * rows * 2048 / 0.5 * flops_per_token(tried)
    assert made.measured and made.rate == pytest.approx(per_second / flops_per_token(config))
    plan.show(made, run, ["base"])
    assert "from steps measured on 2 of its layers: its peak in bfloat16 is not known" in capsys.readouterr().out


def test_a_step_is_measured(monkeypatch):
    monkeypatch.setattr(hardware, "can_compile", lambda device: (False, "eagerly"))
    config = GPTConfig(sequence_len=32, vocab_size=64, n_layer=1, n_head=1, n_kv_head=1, n_embd=32)
    assert 0 < throughput.step_seconds(hardware.setup("cpu"), config, 2) < 60


def test_without_a_compiler_a_gpu_is_not_planned_for(run, gpus, monkeypatch, capsys):
    gpus("H100")
    made = plan.make(run, {})
    monkeypatch.setattr(toolchain, "obstacle", lambda: "no C compiler (apt install gcc)")
    assert tiny.call("plan", "--run=r", "--dry-run") == 2
    assert "no C compiler (apt install gcc)" in capsys.readouterr().err
    with pytest.raises(UserError, match="NANOCHAT_KERNELS=torch and TORCH_COMPILE_DISABLE=1 to insist"):
        plan.make(run, {})  # before anything is measured
    with pytest.raises(UserError, match="no C compiler"):
        plan.check(made, run, ["base"])  # of a stored plan too
    monkeypatch.setenv("NANOCHAT_KERNELS", "torch")
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert plan.make(run, {}) == made


def test_a_plan_made_for_the_cpu_is_told_of_the_gpu(run, gpus, capsys):
    gpus("H100")
    made = plan.make(run, {})
    made.device = "cpu"
    plan.show(made, run, ["base"])
    assert "planned when no GPU could be used; --fresh" in capsys.readouterr().out


@pytest.mark.parametrize("card, minutes", [("4090", 180.0), ("4090", 900.0), ("H100", 60.0), ("H100", 1e5)])
def test_a_time_limit_holds_for_passes_over_conversations_too(run, gpus, monkeypatch, capsys, card, minutes):
    """However fast the card, and with reinforcement learning: nobody has counted the Hub's conversations."""
    gpus(card)
    monkeypatch.setattr(rl_size, "available", lambda: ["gsm8k"])
    whole, made = plan.make(run, {}), plan.make(run, dict(max_minutes=minutes))
    assert "max_iterations" not in whole.flags["mid"]
    assert set(made.seconds) == {"base", "mid", "sft", "rl"}
    planned = sum(made.seconds.values()) + OTHER_SECONDS + made.evaluation
    measuring = measure.SECONDS if minutes > 15 else 0  # which kernels pay
    assert 0.9 * 60 * minutes < planned + measuring <= 60 * minutes  # fewer steps ask fewer held-out questions
    for stage in ("mid", "sft"):
        time = made.seconds[stage] - decide.STARTUP_SECONDS
        assert time == pytest.approx(made.flags[stage]["max_iterations"] * made.batch / made.rate)
    assert (made.steps["base"] < whole.steps["base"]) == (minutes < 900)  # which is more than these cards need
    mid = made.flags["mid"]["max_iterations"]
    assert f"--max-iterations={mid} " in plan.shell(made, run, ["mid"], fresh=False)
    plan.show(made, run, ["mid"])
    shown = capsys.readouterr().out
    assert f"one pass over the conversations, at most {mid:,} steps" in shown and "for all stages" in shown


@pytest.mark.parametrize("nodes, rows", [(2, 16), (32, 1)])
def test_several_machines_share_out_a_step(run, monkeypatch, nodes, rows):
    monkeypatch.setattr(throughput, "speed", SPEED)
    monkeypatch.setattr(throughput, "step_seconds", lambda *args: 1.0)
    made = plan.make(run, dict(device="cpu"), nodes)
    assert made.rate == pytest.approx(32 * 256 * nodes)
    plan.spread(made, nodes)
    assert {made.flags[stage]["device_batch_size"] for stage in ("base", "mid", "sft")} == {rows}
    assert made.batch == rows * 256 * nodes
    for wrong in (3, 64):
        with pytest.raises(UserError, match=f"cannot be shared out among {wrong} machines"):
            plan.spread(made, wrong)


def test_four_machines_of_eight_h100(run, gpus, capsys):
    gpus(*["H100"] * 8)
    made = plan.make(run, {}, 4)
    plan.spread(made, 4)
    rows = made.flags["base"]["device_batch_size"]
    assert made.gpus == 8 and made.batch % (rows * 2048 * 32) == 0
    plan.show(made, run, ["base"])
    assert "4 machines, each 8 x NVIDIA H100" in capsys.readouterr().out


# ---- reinforcement learning


def test_rl_is_planned_where_it_is_asked_for(run, capsys):
    usual = plan.make(run, dict(device="cpu"))
    assert "rl" not in usual.flags and "word_problems" not in usual.flags["sft"]
    assert "RL=" not in plan.shell(usual, run, list(plan.USUAL), fresh=False)
    assert tiny.call("plan", "--run=r", "--device=cpu", "--stages=base,sft,rl,eval") == 0
    said = capsys.readouterr().out
    assert re.search(r"\n  rl +\d+ steps of 8 questions, word_sums \(predicted\), about \d+ (s|min)\n", said)
    made = plan.load(run, {})
    assert made.flags["sft"]["word_problems"] == rl_size.WORD_PROBLEMS and made.seconds["rl"] > 20
    assert "word_sums" in plan.shell(made, run, ["rl"], fresh=False)
    assert tiny.call("plan", "--run=r", "--device=cpu") == 0  # from now on it belongs to all stages
    assert "\n  rl " in capsys.readouterr().out
    short = plan.make(run, dict(device="cpu", max_minutes=6.0), rl=True)
    assert short.flags["rl"]["num_iterations"] < made.flags["rl"]["num_iterations"]
    assert sum(short.seconds.values()) + OTHER_SECONDS <= 6 * 60
    without = plan.make(run, dict(device="cpu", max_minutes=1000.0))
    assert made.disk == without.disk * 4 / 3  # checkpoints of four stages


def test_rl_is_planned_with_its_held_out_questions():
    """128 of them are asked 4 times, and once greedily: at first, after each 20 steps, and at last."""
    flags = rl_size.flags("embedded", 1)
    practice, examined = rl_size.seconds("embedded", flags, 1000.0, "cpu")
    _, answer = rl_size.TOKENS["embedded"]
    assert examined == pytest.approx(4 * 128 * 5 * answer * 3 / 1000)
    longer = rl_size.seconds("embedded", dict(flags, num_iterations=61), 1000.0, "cpu")
    assert longer == pytest.approx((practice * 61 / 60, examined * 5 / 4))


def test_rl_is_refused_where_sft_was_not_made_for_it_or_there_is_nothing_to_practise(run, capsys, tmp_path):
    plan.store(plan.make(run, dict(device="cpu")), run)
    assert tiny.call("plan", "--run=r", "--device=cpu", "--stages=rl") == 2
    assert "planned without rl" in capsys.readouterr().err
    (tmp_path / "mine.jsonl").write_text('{"text": "a"}\n' * 100)
    assert tiny.call("plan", "--run=q", "--device=cpu", f"--data={tmp_path / 'mine.jsonl'}", "--stages=base,rl") == 2
    assert "nothing to practise" in capsys.readouterr().err


FLAGS = dict(
    TOKENIZER=tok_train.Flags, BASE=base_train.Flags, MID=ChatFlags, SFT=ChatFlags, RL=RLFlags, CORE=base_eval.Flags,
    CHAT=chat_eval.Flags,
)  # fmt: skip


@pytest.mark.parametrize("data", ["hub", "embedded"])
def test_every_stage_knows_the_flags_that_it_is_given(gpus, run, monkeypatch, data):
    """--no-tune among them, which is nothing to rl."""
    gpus("H100")
    monkeypatch.setattr(rl_size, "available", lambda: ["gsm8k"])
    monkeypatch.setattr(throughput, "speed", lambda *args: (10_000.0, True))
    made = plan.make(run, dict(data=data, max_minutes=1000.0), rl=True)
    found = plan.shell(made, run, list(plan.STAGES), fresh=True, tune=False)
    for name, given in re.findall(r"^([A-Z]+)=\((.*)\)$", found, re.M):
        if name != "STAGES":
            parsed = parse(FLAGS[name], "", shlex.split(given))
            assert getattr(parsed, "tune", False) is False and (name in ("CORE", "CHAT") or parsed.fresh)


@pytest.mark.parametrize("there", [True, False])
def test_on_gpus_gsm8k_is_practised_where_it_can_be_had(gpus, run, monkeypatch, there):
    gpus("H100")
    monkeypatch.setattr(rl_size, "available", lambda: ["gsm8k"] * there)
    made = plan.make(run, {})
    assert ("rl" in made.flags) == there
    if there:
        assert made.flags["rl"]["task"] == "gsm8k" and made.flags["rl"]["num_iterations"] == 467
        assert made.seconds["rl"] > 100 and "word_problems" not in made.flags["sft"]
        plan.spread(made, 32)
        assert made.flags["rl"]["questions"] == 32


def test_a_path_that_is_no_text_reaches_the_shell_as_it_is(run, tmp_path):
    """Bytes that are no UTF-8 are surrogates in Python."""
    (tmp_path / "caf\udce9.txt").write_text("Some words.\n\n" * 400)
    asked = [f"--data={tmp_path}/caf\udce9.txt", "--device=cpu", "--stages=tokenizer", f"--write={tmp_path}/shell"]
    assert tiny.call("plan", "--run=a", *asked) == 0
    assert b"caf\xe9.txt" in (tmp_path / "shell").read_bytes()
