"""Choosing kernels by measuring the compiled step, with a stand-in for the card and its clock."""

import json
import os
import socket
from datetime import timedelta

import pytest
import standins
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._dynamo import config as dynamo

from kernels import dispatch, measured, tuned, use
from nanochat import hardware, measure
from nanochat.data.loader import Batch
from nanochat.gpt import GPT

CONFIG = tiny.model().config
GAINS = {
    "mix_rms_norm=torch": -3.0,
    "mlp_relu2=triton": -2.0,
    "linear_cross_entropy=torch": +4.0,
}  # ms of a step of 100


@pytest.fixture
def card(tmp_path, monkeypatch):
    """A card on which every probe passes and a step takes what the setting in force says."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(dispatch, "_modes", {"*": "auto"})
    monkeypatch.setattr(dispatch, "_DECIDED", {})
    monkeypatch.setattr(dispatch, "_TRIED", {})
    monkeypatch.setattr(dispatch, "INSTALLED", True)
    monkeypatch.setattr(dispatch.probing, "check", lambda *_: None)
    monkeypatch.setattr(tuned, "architecture", lambda index: "sm_100")  # a kind of card that nobody has measured
    monkeypatch.setattr(measured, "identity", lambda index: dict(card="Card 99"))
    monkeypatch.setattr(measured, "_kept", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(hardware.Hardware, "synchronize", lambda self: None)
    monkeypatch.setattr(measure.tuning, "tune", lambda *args, **rest: {})
    made = Card()
    monkeypatch.setattr(measure, "shallow_step", lambda *args: made.step())
    monkeypatch.setattr(measure, "update_step", lambda *args: made.step("update"))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: made.now)
    monkeypatch.setattr(measure.measure, "__defaults__", (lambda: made.now,))
    yield made
    measured.adopt(None)


class Card:
    """Its clock, and what was compiled, with Dynamo's limit then."""

    def __init__(self):
        self.now, self.made, self.first_seconds, self.compile_seconds = 0.0, [], 15.0, 15.0

    @property
    def compiled(self):
        return len(self.made)

    def step(self, kind="step"):
        first = True

        def call():
            nonlocal first
            if first:
                first = False
                self.now += self.compile_seconds if self.made else self.first_seconds
                self.made.append((kind, dynamo.recompile_limit))
            modes = ",".join(f"{name}={mode}" for name, mode in dispatch._modes.items())
            self.now += (100 + sum(gain for part, gain in GAINS.items() if part in modes)) / 1e3
            return 1.0

        return call


H100 = hardware.Hardware(torch.device("cuda", 0), "Card 99", torch.bfloat16, "", 80 << 30)


def test_what_makes_the_step_faster_is_taken_and_kept(card):
    said = []
    choice = measure.choose(CONFIG, 4, H100, "", said.append)
    modes = dispatch.parse(choice["setting"])
    assert modes["mix_rms_norm"] == modes["qk_norm_rotary"] == "torch" and modes["mlp_relu2"] == "triton"
    assert modes["*"] == "auto" and "linear_cross_entropy" not in modes and "flash_attention" not in modes
    rows = {row["group"]: row for row in choice["rows"]}
    assert not rows["norms"]["on"] and rows["MLP"]["on"] and rows["head"]["on"]
    assert rows["norms"]["on_ms"] == pytest.approx(100) and rows["norms"]["off_ms"] == pytest.approx(97)
    assert rows["MLP"]["off_ms"] == pytest.approx(97) and rows["MLP"]["on_ms"] == pytest.approx(95)
    assert list(rows) == [*(group for group in measure.GROUPS if group != "fp8"), measure.TEMPLATE]
    assert rows["optimizer"]["of"] == "update" and not choice["left"] and not rows[measure.TEMPLATE]["on"]
    assert [kind for kind, _ in card.made] == ["step"] * (len(rows) - 1) + ["update"] * 2 + ["step"]
    assert choice["seconds"] < measure.SECONDS
    assert all(limit >= 2 * len(card.made) for _, limit in card.made)  # delayed fp8 compiles for two shapes each
    assert any("about 3 minutes" in line for line in said)
    again = measure.choose(CONFIG, 4, H100, "", said.append)
    assert again == choice and card.compiled == 2 + len(rows)  # nothing is measured twice
    measure.choose(CONFIG, 8, H100, "", said.append)
    assert card.compiled > 2 + len(rows)  # another step


def test_on_amds_cards_the_template_is_not_tried(card, monkeypatch):
    """Their compiler may end the process, and in no child has it been tried."""
    monkeypatch.setattr(dispatch, "unfit", lambda *asked: "")  # which would compile every kernel in a child
    monkeypatch.setattr(torch.version, "hip", "7.0")
    choice = measure.choose(CONFIG, 4, H100, "", lambda line: None)
    assert measure.TEMPLATE not in {row["group"] for row in choice["rows"]} and len(choice["rows"]) > 3


def test_the_template_is_taken_where_it_is_faster(card, monkeypatch):
    """Over our product too, which was taken before it."""
    monkeypatch.setitem(GAINS, "mlp_relu2=inductor", -5.0)
    choice = measure.choose(CONFIG, 4, H100, "", lambda line: None)
    assert dispatch.parse(choice["setting"])["mlp_relu2"] == "inductor"
    row = choice["rows"][-1]
    assert row["group"] == measure.TEMPLATE and row["on"] and row["off_ms"] - row["on_ms"] == pytest.approx(3)


def test_it_ends_in_time_and_says_what_keeps_its_default(card):
    card.first_seconds = card.compile_seconds = 50.0
    said = []
    choice = measure.choose(CONFIG, 4, H100, "", said.append)
    assert choice["seconds"] <= measure.SECONDS
    assert [row["group"] for row in choice["rows"]] == ["norms", "attention"]
    assert choice["left"] == ["MLP", "head", "embeddings", "optimizer", measure.TEMPLATE]
    assert any(line.startswith("no time was left to measure") for line in said)


def test_how_long_a_compilation_takes_is_learnt_from_those_after_the_first(card):
    """The first fills the compiler's caches; and two for the optimizer's group do not fit where one does."""
    card.first_seconds = 60.0
    choice = measure.choose(CONFIG, 4, H100, "", lambda line: None)
    assert choice["left"] == ["optimizer"] and choice["seconds"] <= measure.SECONDS
    assert len(choice["rows"]) == 6 and choice["rows"][-1]["group"] == measure.TEMPLATE


def cpu_step(monkeypatch, make):
    """(a step on the CPU, the functions that were to be compiled for it)."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    here = hardware.Hardware(torch.device("cpu"), "cpu", torch.float32, "", 1)
    return make(here), compiled


def test_a_measured_step_compiles_no_update(monkeypatch):
    step, compiled = cpu_step(monkeypatch, lambda here: measure.shallow_step(CONFIG, 2, here, ""))
    assert [type(function) for function in compiled] == [GPT] and compiled[0].config.n_layer == measure.LAYERS
    losses = [step() for _ in range(3)]
    assert losses[2] < losses[0]  # it is a whole step all the same


def test_a_measured_update_compiles_no_step_and_moves_what_is_large(monkeypatch):
    made = []
    real = measure.shallow
    monkeypatch.setattr(measure, "shallow", lambda *args: made.append(real(*args)) or made[0])
    step, compiled = cpu_step(monkeypatch, lambda here: measure.update_step(CONFIG, here))
    before = {name: p.detach().clone() for name, p in made[0].named_parameters()}
    assert step() == 0.0 and not any(isinstance(function, GPT) for function in compiled) and compiled
    moved = {name for name, p in made[0].named_parameters() if not torch.equal(p, before[name])}
    assert "lm_head.weight" in moved and any("mlp" in name for name in moved)
    assert not any("gate" in name or "lambda" in name for name in moved)


def test_fp8_has_groups_of_its_own(card):
    card.first_seconds = card.compile_seconds = 1.0
    groups = {row["group"] for row in measure.choose(CONFIG, 4, H100, "current", lambda line: None)["rows"]}
    assert "fp8" in groups and "MLP" not in groups


def test_where_nothing_is_to_be_chosen(card):
    cpu = hardware.Hardware(torch.device("cpu"), "cpu", torch.float32, "", 1)
    assert measure.choose(CONFIG, 4, cpu, "") is None
    with use("auto,rms_norm=torch"):
        assert measure.choose(CONFIG, 4, H100, "") is None
    assert card.compiled == 0


def test_a_failure_leaves_the_defaults_and_is_said(card, monkeypatch):
    def failing(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measure, "shallow_step", failing)
    said = []
    choice = measure.choose(CONFIG, 4, H100, "", said.append)
    assert (choice["setting"], choice["rows"]) == ("auto", []) and "steps" not in measured.load(0)
    assert any("CUDA out of memory" in line for line in said)


@pytest.mark.parametrize("where", ["tune", "shallow_step", "other"])
def test_a_gpu_that_is_lost_ends_it_with_what_to_do(card, monkeypatch, where):
    """Training could not go on with the defaults: every call on the card would fail."""

    def failing(*args, **rest):
        if where == "other" and not card.made:
            return card.step()
        standins.lost(monkeypatch)
        torch.cuda.empty_cache()

    monkeypatch.setattr(*((measure.tuning, "tune") if where == "tune" else (measure, "shallow_step")), failing)
    with pytest.raises(dispatch.Lost, match="illegal memory access .* no more: start again with .*--no-tune") as told:
        measure.choose(CONFIG, 4, H100, "", lambda line: None)
    assert ("mix_rms_norm=torch" in str(told.value)) == (where == "other")


def test_what_was_not_measured_goes_on_with_the_block_sizes_that_it_began_with(card):
    """Else a resumed stage would take those that `kernels tune` has found meanwhile."""
    row = dict(dtype="*", config=dict(elements=3, num_warps=1))
    measured.store(0, blocks={"adamw_": [row]})
    choice = measure.choose(CONFIG, 4, H100, "", print, wanted=False)
    assert not card.made and choice["blocks"] == {"adamw_": [row]}
    measured.store(0, blocks={"adamw_": [dict(row, config=dict(elements=7, num_warps=1))]})
    measure.adopt(choice)
    assert measured.blocks(0) == {"adamw_": [row]}


def test_block_sizes_of_a_choice_are_in_force_after_it_was_adopted(card):
    row = dict(dtype="*", config=dict(elements=3, num_warps=1))
    measure.adopt(dict(setting="auto", blocks={"rms_norm": [row]}))
    assert tuned.config("rms_norm", torch.bfloat16, 64, torch.device("cuda", 0)) == row["config"]


def one_rank_measures(rank, port, folder):
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found = [None]
    if rank == 0:
        here = hardware.Hardware(torch.device("cpu"), "cpu", torch.float32, "", 1, rank=0, world=2)
        ids = torch.arange(2 * 64).view(2, 64) % 300
        batch = Batch(ids, ids, None)
        step = measure.ready_step(tiny.model(), here, iter(lambda: batch, None), 2, compiled=False)
        found = [[step(), step()]]
    dist.broadcast_object_list(found, src=0)
    (folder / f"{rank}.json").write_text(json.dumps(found[0]))
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_rank_measures_by_itself_while_the_others_wait(tmp_path):
    """No collective in a measured step: the others would never take part in it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(one_rank_measures, args=(port, tmp_path), nprocs=2)
    losses = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert losses[0] == losses[1] and losses[0][1] < losses[0][0]


def test_a_card_that_no_kernel_is_for_is_not_measured(card, monkeypatch):
    """A T4, say: nothing is tuned, nothing compiled."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (7, 5))
    monkeypatch.setattr(measure.tuning, "tune", lambda *args, **rest: pytest.fail("tuned"))
    choice = measure.choose(CONFIG, 4, H100, "", lambda line: pytest.fail(line))
    assert choice["setting"] == "auto" and choice["rows"] == [] and card.compiled == 0


def test_every_op_that_is_switched_or_tuned_has_its_shapes():
    found = measure.cases(CONFIG, 4)
    for name in {*(op for ops in measure.GROUPS.values() for op in ops), *measure.TUNED}:
        for case in found[name]:
            assert measure.OPS[name].size(case) > 0
            measure.OPS[name].inputs(case, torch.bfloat16, "meta")
