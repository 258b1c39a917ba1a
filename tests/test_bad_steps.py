"""Steps that go wrong change nothing; and how a step is split into micro-batches and ranks changes nothing either.

Run again on the null device (test_null_device.py), where the flag is made and read as on a GPU.
"""

import json
import math
import os
import socket
import types
from dataclasses import replace
from datetime import timedelta

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_training import assert_same, interrupted_at, losses, train
from test_training import home as home  # noqa: PLC0414 (a fixture)

import kernels
from kernels import OPS
from nanochat import checkpoint, optim, step, trainer
from nanochat.data.loader import Batch, conversation_encoder
from nanochat.data.packing import IGNORED, Document, Packer
from nanochat.errors import EXIT_INTERRUPTED
from nanochat.hardware import setup
from nanochat.recipe import Schedule
from nanochat.run import Run
from nanochat.step import SIGMAS, WINDOW, is_spike

PARTS = {
    "head": lambda model: model.lm_head.weight,
    "matrix": lambda model: model.transformer["h"][1].mlp.c_fc.weight,
    "scalar": lambda model: model.resid_lambdas,
}


def everything(stage) -> dict[str, torch.Tensor]:
    """Copies of all that a step may change. Asked before the first step, there are no moments."""
    found = {f"model.{name}": t for name, t in stage.model.state_dict().items()}
    found |= {f"optimizer.{name}": t for name, t in stage.optimizer.full_state().items()}
    found |= {f"fp8.{name}": t for name, t in stage.model.histories().items()}
    return {name: tensor.clone() for name, tensor in found.items()}


def spoil(stage, part, steps, value):
    """From now on a gradient is bad at these steps. On a GPU autograd has none of a matrix: products add to it."""
    weight = PARTS[part](stage.model)

    def before_update(*call) -> None:
        if stage.state.step in steps:
            weight.grad.mul_(value)

    if any(getattr(module, "gradient", None) is weight.grad is not None for module in stage.model.modules()):
        stage.optimizer.register_step_pre_hook(before_update)
    else:
        weight.register_hook(lambda grad: grad * value if stage.state.step in steps else None)


def same(before, after):
    """Whether nothing was changed; moments that a device has made before it knew are zero."""
    return all(torch.equal(before[key], after[key]) if key in before else not after[key].any() for key in after)


def poison(monkeypatch, steps, part="matrix", value=math.nan):
    """Makes a gradient bad at these steps (from 0), but not the loss; returns, by step, whether nothing changed."""
    plain, seen, hooked = trainer.step, [], []

    def poisoned(stage, *rest):
        if stage not in hooked:
            hooked.append(stage)
            spoil(stage, part, steps, value)
        unread = stage.optimizer.finish_step()
        before = everything(stage)
        stage.optimizer._taken = unread
        outcome = plain(stage, *rest)
        assert math.isfinite(outcome.loss)
        taken = stage.optimizer.finish_step()
        after = everything(stage)
        seen.append(same(before, after))
        assert taken == (stage.state.step not in steps)
        stage.optimizer._taken = taken  # for whoever asks next
        return outcome

    monkeypatch.setattr(trainer, "step", poisoned)
    return seen


@pytest.mark.parametrize(
    "part, value",
    [
        ("head", math.nan),
        ("head", math.inf),
        ("matrix", math.inf),
        ("scalar", math.nan),
        pytest.param("matrix", math.nan, marks=pytest.mark.slow),
        pytest.param("scalar", math.inf, marks=pytest.mark.slow),
    ],
)
def test_a_bad_gradient_changes_nothing(home, monkeypatch, capsys, part, value):  # noqa: F811
    seen = poison(monkeypatch, (0, 5, 6), part, value)
    assert train(home, "a") == 0
    assert [i for i, kept in enumerate(seen) if kept] == [0, 5, 6]
    assert Run.open("a").summary("base")["skipped_steps"] == 3
    assert capsys.readouterr().out.count("nothing was changed, its gradient is not finite") == 3
    assert all(t.isfinite().all() for t in Run.open("a").checkpoint("base").tensors("model").values())


def test_fp8_histories_are_put_back(home, monkeypatch):  # noqa: F811
    seen = poison(monkeypatch, (4,))
    assert train(home, "a", "base", "--fp8", "--fp8-scaling=delayed") == 0
    assert [i for i, kept in enumerate(seen) if kept] == [4]


def test_float16_halves_its_scale_and_that_is_no_bad_step(home, monkeypatch):  # noqa: F811
    """More in a row than would end a run."""
    monkeypatch.setenv("NANOCHAT_DTYPE", "float16")
    seen = poison(monkeypatch, range(2, 9))
    assert train(home, "a") == 0
    assert [i for i, kept in enumerate(seen) if kept] == list(range(2, 9))
    assert Run.open("a").checkpoint("base").meta["state"]["scaler"]["scale"] == 2.0 ** (16 + 1 - 7)


def test_nothing_is_saved_while_steps_are_bad_and_five_end_the_run(home, monkeypatch, capsys):  # noqa: F811
    poison(monkeypatch, range(5, 12))
    assert train(home, "a", "base", "--save-every=1") == 2
    assert "5 steps in a row up to step 10; the last checkpoint is of step 5" in capsys.readouterr().err
    assert checkpoint.latest(Run.open("a").stage("base")).step == 5


def test_what_was_not_saved_is_saved_with_the_next_good_step(home, monkeypatch):  # noqa: F811
    saved, plain = [], trainer.save
    monkeypatch.setattr(
        trainer, "save", lambda stage, finished: (saved.append(stage.state.step), plain(stage, finished))
    )
    poison(monkeypatch, (2, 3))  # steps 3 and 4: 3 would be saved, 4 saved and evaluated
    assert train(home, "a") == 0
    assert saved == [5, 6, 8, 9, 12, 12]


def test_stopped_among_bad_steps_it_goes_on_from_before_them(home, monkeypatch):  # noqa: F811
    with monkeypatch.context() as patched:
        poison(patched, (3, 4, 5))
        with interrupted_at(patched, 5):
            assert train(home, "a") == EXIT_INTERRUPTED
    assert checkpoint.latest(Run.open("a").stage("base")).step == 3
    assert train(home, "a") == 0 == train(home, "b")
    assert_same("base")


def test_a_device_that_cannot_be_waited_for_is_asked_a_step_later(monkeypatch):
    """What CUDA does, on a CPU: the updates get the flag, the counters are put right when the host has read it."""
    model = tiny.model()
    optimizer = model.setup_optimizer()
    reads, plain = [], optim.Late.read
    monkeypatch.setattr(optim.Late, "read", lambda late: reads.append(1) or plain(late))
    monkeypatch.setattr(optim, "not_finite", lambda grads: Elsewhere(plain_not_finite(grads)))
    fill(model, 0)
    optimizer.step()
    assert not reads and optimizer.finish_step() is True and len(reads) == 1
    before = {**model.state_dict(), **optimizer.full_state()}
    before = {name: tensor.clone() for name, tensor in before.items()}
    fill(model, 1)
    model.lm_head.weight.grad[3, 4] = math.inf
    optimizer.step()
    assert len(reads) == 1  # nobody waited
    fill(model, 2)
    optimizer.step()  # reads what the step before was
    assert len(reads) == 2
    whole = tiny.model()
    twin = whole.setup_optimizer()
    for seed in (0, 2):
        fill(whole, seed)
        twin.step()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), whole.state_dict().values()))
    one, two = optimizer.full_state(), twin.full_state()
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert any(not torch.equal(before[name], value) for name, value in one.items())


plain_not_finite = optim.not_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("values", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf], []], ids=str)
def test_every_element_that_is_not_finite_is_found(values, dtype):
    largest = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)  # whose sum is not finite
    for fill in (torch.zeros(3, 5, dtype=dtype), largest):
        bad = fill.clone()
        bad.view(-1)[2 : 2 + len(values)] = torch.tensor(values, dtype=dtype)
        assert plain_not_finite([torch.ones(2), bad, fill]).item() == bool(values)


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a GPU, and must not be read by who should not wait."""

    is_cpu = False  # type: ignore[assignment]

    def __new__(cls, tensor):
        return tensor.as_subclass(cls)

    def item(self):
        raise AssertionError("waited for")


def fill(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("setting", ["torch", "triton"])
@pytest.mark.parametrize("name", ["adamw_", "muon_momentum_", "muon_update_"])
def test_an_update_that_is_skipped_writes_nothing(name, setting):
    op = OPS[name]
    case = dict(N=1001) if name == "adamw_" else dict(K=2, m=33, n=70)
    for skip in (1, 0):
        inputs, plain = (op.inputs(case, torch.float32, "cpu") for _ in range(2))
        for key in ("grad", "update"):
            if key in inputs and skip:
                inputs[key][..., 3] = math.nan
        with kernels.use(f"torch,{name}={setting}"):
            op.fn(**inputs, skip=torch.tensor(skip, dtype=torch.int32))
            if not skip:
                op.fn(**plain)
        assert all(torch.equal(inputs[key], plain[key]) for key in op.mutates), skip


# ---- spikes


def test_a_spike_is_far_above_the_last_losses():
    recent = [2.0 + 0.1 * (-1) ** i for i in range(WINDOW)]
    assert not is_spike(recent, 2.0 + 0.1 * SIGMAS - 1e-6) and is_spike(recent, 2.0 + 0.1 * SIGMAS + 1e-6)
    assert not is_spike(recent[1:], 100.0)  # too few to say
    assert not is_spike(recent, math.nan)  # something else
    assert not is_spike(recent, 0.0)


def spiked(monkeypatch, steps):
    """Training whose losses are 3 ± 0.1, and 9 at these steps; returns the steps that changed nothing."""
    plain, skipped = trainer.step, []

    def spoilt(stage, model, *rest):
        wanted = 9.0 if stage.state.step in steps else 3 + 0.1 * (-1) ** stage.state.step

        def scaled(*args, **kwargs):
            loss = model(*args, **kwargs)
            return loss * (wanted * 128 / loss.detach())  # 128 targets in a micro-batch

        unread = stage.optimizer.finish_step()
        before = everything(stage)
        stage.optimizer._taken = unread
        outcome = plain(stage, scaled, *rest)
        verdict = stage.optimizer.finish_step()
        after = everything(stage)
        stage.optimizer._taken = verdict
        if same(before, after):
            skipped.append(stage.state.step)
        return outcome

    monkeypatch.setattr(trainer, "step", spoilt)
    return skipped


LONG = ["--num-iterations=30", "--eval-every=-1", "--save-every=8"]


@pytest.fixture
def short_window(monkeypatch):
    """Of 16 losses, so that it is soon full."""
    for module in (trainer, step):
        monkeypatch.setattr(module, "WINDOW", 16)


def test_a_spike_is_skipped_and_enters_the_window(home, monkeypatch, capsys, short_window):  # noqa: F811
    """After one of 16, 9 is within six deviations: 3.4 ± 1.5."""
    with monkeypatch.context() as patched:
        skipped = spiked(patched, (5, 22, 23, 24))  # at 5 there are too few to say, at 22 it is forgotten
        assert train(home, "a", "base", *LONG, "--fp8", "--fp8-scaling=delayed") == 0
        assert skipped == [22]
    assert "step 23: skipped, its loss 9.0000 is a spike" in capsys.readouterr().out
    assert Run.open("a").summary("base")["skipped_steps"] == 1
    assert len(losses("a", "base")) == 31


def test_the_window_is_in_the_checkpoint(home, monkeypatch, short_window):  # noqa: F811
    with monkeypatch.context() as patched:
        skipped = spiked(patched, (22,))
        with interrupted_at(patched, 21):
            assert train(home, "a", "base", *LONG) == EXIT_INTERRUPTED
        assert train(home, "a", "base", *LONG) == 0
        assert skipped == [22]
        skipped.clear()
        assert train(home, "b", "base", *LONG, "--no-spike-guard") == 0
        assert skipped == []


# ---- sums


def test_a_micro_batch_without_targets_is_no_harm():
    rows = [batch(seed, kept) for seed, kept in ((0, 5), (1, 0), (2, 9))]
    outcome, found = stepped(rows, 3)
    assert outcome.loss == pytest.approx(whole(rows)[0], rel=1e-6)
    assert math.isfinite(outcome.loss) and distance(found, whole(rows)[1]) < 1e-6


@pytest.mark.parametrize("split", [1, 2, 3, 6])
def test_gradients_do_not_depend_on_the_split(split):
    rows = [batch(seed, kept) for seed, kept in enumerate((5, 9, 0, 1, 30, 2))]
    size = len(rows) // split
    together = [join(rows[i : i + size]) for i in range(0, len(rows), size)]
    outcome, found = stepped(together, split)
    loss, wanted = whole(rows)
    assert outcome.loss == pytest.approx(loss, rel=1e-6)
    assert distance(found, wanted) < 1e-6


def batch(seed, kept):
    """A row of 32 tokens of which the last `kept` are learnt."""
    ids = torch.randint(300, (1, 33), generator=torch.Generator().manual_seed(seed))
    targets = ids[:, 1:].clone()
    targets[:, : 32 - kept] = IGNORED
    return Batch(ids[:, :-1], targets, None)


def join(batches):
    return Batch(torch.cat([b.inputs for b in batches]), torch.cat([b.targets for b in batches]), None)


def stepped(batches, accumulation, model=None, hardware=None):
    """The outcome of a step, and the gradients that the optimizer took."""
    model = model or tiny.model()
    hardware = hardware or setup("cpu")
    tokens = sum(b.targets.numel() for b in batches) * hardware.world
    optimizer, taken = model.setup_optimizer(), {}
    reduce = optimizer._reduce

    def noted(group):
        taken[len(taken)] = reduce(group)
        return taken[len(taken) - 1]

    optimizer._reduce = noted
    settings = trainer.Settings(10, len(batches[0].inputs), 32, tokens)
    stage = types.SimpleNamespace(
        state=trainer.State(), schedule=Schedule(10, 0, 0.0), optimizer=optimizer, scaler=None, spike_guard=True,
        hardware=hardware, model=model, settings=settings,
    )  # fmt: skip
    outcome = trainer.step(stage, model, iter(batches), accumulation)
    return outcome, [grad for group in taken.values() for _, grad in group]


def whole(batches):
    """Loss and gradients of one large batch, with the mean over its targets."""
    model, one = tiny.model(), join(batches)
    optimizer = model.setup_optimizer()
    loss = model(one.inputs, one.targets)
    loss.backward()
    return loss.item(), [grad for group in optimizer.param_groups for _, grad in optimizer._reduce(group)]


def distance(found, wanted):
    """‖difference‖ / ‖gradient‖ over all of it."""
    apart = sum((a.double() - b.double()).square().sum() for a, b in zip(found, wanted, strict=True))
    return (apart / sum(b.double().square().sum() for b in wanted)).sqrt().item()


ROWS = (5, 0, 9, 1, 30, 2, 0, 32)  # targets of each row; on two ranks a micro-batch is of two rows


def rank_of_two(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    hardware = replace(setup("cpu"), rank=rank, world=2)
    rows = [batch(seed, kept) for seed, kept in enumerate(ROWS)]
    mine = [join(rows[start + 2 * rank : start + 2 * rank + 2]) for start in (0, 4)]
    outcome, grads = stepped(mine, 2, model=(model := tiny.model()), hardware=hardware)
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    bad, _ = stepped(mine, 2, model=poisoned(model, rank), hardware=hardware)  # one rank's NaN
    kept = all(torch.equal(after[name], p) for name, p in model.named_parameters())
    said = dict(loss=outcome.loss, grads=grads, kept=kept, finite=math.isfinite(bad.loss))
    torch.save(said, folder / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads sometimes abort a process that ends the ordinary way


def poisoned(model, rank):
    """One NaN on rank 1, in a row that rank 0 owns."""

    def spoilt(grad):
        grad = grad.clone()
        grad[0, 0] = math.nan
        return grad

    if rank == 1:
        model.lm_head.weight.register_hook(spoilt)
    return model


def test_two_ranks_take_the_step_of_one_and_share_a_bad_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(rank_of_two, (port, tmp_path), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    loss, wanted = whole([batch(seed, kept) for seed, kept in enumerate(ROWS)])
    parts = zip(one["grads"], two["grads"], wanted, strict=True)
    found = [a if a.shape == whole.shape else torch.cat((a, b)) for a, b, whole in parts]
    assert distance(found, wanted) < 1e-6
    for said in (one, two):
        assert said["loss"] == pytest.approx(loss, rel=1e-6) and said["kept"] and said["finite"]


# ---- nothing to learn


def test_documents_with_nothing_to_learn_are_not_packed():
    packer = Packer(8, pad=True)
    tokens = torch.arange(12, dtype=torch.int32).numpy()
    for first in (3, 7, 8, 12):  # the first token that is learnt
        packer.add(Document(tokens, tokens >= first))
    assert (packer.seen, packer.left_out, len(packer)) == (4, 2, 2)


@pytest.mark.slow
def test_many_conversations_without_answers_are_said_and_none_with_is_refused(home, capsys):  # noqa: F811
    assert train(home, "a") == 0 == train(home, "b")
    talks = [json.loads(line) for line in (home / "chat.jsonl").read_text().splitlines()]
    for talk in talks[::2]:
        talk["messages"][0]["content"] *= 40  # the answer begins beyond the row
    (home / "chat.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    assert train(home, "a", "sft", "--source=base") == 0
    assert "have nothing to learn" in capsys.readouterr().out
    summary = Run.open("a").summary("sft")
    assert 0.5 <= summary["documents_left_out"] / summary["documents"] < 1 and summary["skipped_steps"] == 0
    for talk in talks:
        talk["messages"][0]["content"] *= 40
    (home / "chat.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    assert train(home, "b", "sft", "--source=base", "--num-iterations=3") == 2
    assert "no conversation has anything to learn" in capsys.readouterr().err


def test_an_encoder_marks_what_is_learnt():
    tokenizer = tiny.tokenizer()
    talk = dict(messages=[dict(role="user", content="the cat"), dict(role="assistant", content="sees")])
    document = conversation_encoder(tokenizer, masked=True)([talk])[0]
    assert document.trained.any() and not document.trained[0]
