"""Reinforcement learning: its gradient against a plain one, its rollouts, exact resume, real questions, refusals."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import killed
import practised
import pytest
import tiny
import torch

from nanochat import rl, step, trainer
from nanochat.data.microworld.word_problems import THINGS
from nanochat.engine import Engine, Request, Sampling
from nanochat.errors import UserError
from nanochat.gpt import GPTConfig
from nanochat.hardware import Hardware
from nanochat.log import read_log
from nanochat.policy_gradient import Mismatch, Objective, advantages, rows
from nanochat.rl import Practising
from nanochat.rl_stage import Questions, RLFlags, slots
from nanochat.rollouts import Asked, Sample, roll_out
from nanochat.run import Run
from nanochat.step import Outcome
from nanochat.tasks import TASKS
from nanochat.tasks.practice import PRACTICE
from nanochat.trainer import State

WORDS = PRACTICE["word_sums"]
FLAGS = (
    "--run=a --device-type=cpu --reward=form --num-iterations=3 --questions=4 --num-samples=4 --max-new-tokens=16 "
    "--eval-questions=4 --eval-samples=2 --eval-every=2 --save-every=1 --init-lr-frac=0.5"
).split()


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A base directory with a run whose SFT is done."""
    folder = tmp_path_factory.mktemp("practised")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("NANOCHAT_BASE_DIR", str(folder))
        practised.run()
    return folder


@pytest.fixture
def home(taught, tmp_path, monkeypatch):
    """A copy of it."""
    shutil.copytree(taught, tmp_path / "home")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    return tmp_path / "home"


@pytest.fixture
def model(home):
    return Run.open("a").checkpoint("sft").model("cpu", torch.float32)


def copy(model):
    twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict())
    twin.set_dtype(torch.float32)
    return twin


def rolled(model, asked, samples=4, step=0, slots=16):
    return roll_out(Engine(copy(model), slots), Run.open("a").tokenizer(), WORDS, "form", asked, samples, 12, 7, step)


PRACTISED = WORDS.train()
ASKED = [Asked(i, question) for i, question in enumerate(PRACTISED[:4])]

# ---- the gradient


def made_up(model, groups, size, rewards):
    """Samples of many lengths, some of whose tokens are forced."""
    draw, found = random.Random(0), []
    for place in range(groups):
        prompt = [draw.randrange(300) for _ in range(draw.randint(3, 9))]
        for _ in range(size):
            output = [draw.randrange(300) for _ in range(draw.randint(1, 12))]
            drawn = [True, *(draw.random() < 0.7 for _ in output[1:])]
            logprobs = [draw.uniform(-9, -3) for _ in output]
            reward = rewards(place, draw)
            found.append(Sample(place, len(prompt), prompt + output, drawn, logprobs, [], "stop", reward))
    return found


def plain_gradient(model, samples, size, objective, limit):
    """The gradient by the formula, a sample at a time, without padding, masks or a fused loss."""
    groups = [samples[at : at + size] for at in range(0, len(samples), size)]
    tokens = sum(sum(sample.drawn) for sample in samples)
    model.zero_grad()
    for group in groups:
        values = [sample.reward for sample in group]
        mean = sum(values) / size
        std = (sum((value - mean) ** 2 for value in values) / size) ** 0.5
        for sample in group:
            advantage = sample.reward - mean
            if objective.by_std:
                advantage = advantage / (std + 1e-6) if std > 1e-9 else 0.0
            logp = torch.log_softmax(model(torch.tensor([sample.tokens]))[0].double(), -1)
            mine = [i for i, own in enumerate(sample.drawn) if own]
            for i in mine:
                at = sample.prompt + i
                now = logp[at - 1, sample.tokens[at]]
                share = {"token": 1 / tokens, "sequence": 1 / len(samples) / len(mine)}.get(
                    objective.normalize, 1 / len(samples) / limit
                )
                part = advantage * now
                if objective.truncate:
                    part = part * min(torch.exp(now.detach() - sample.logprobs[i]).item(), objective.truncate)
                (-share * part).backward(retain_graph=True)
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


VARIANTS = [
    Objective(), Objective(by_std=True), Objective(normalize="sequence"), Objective(normalize="constant"),
    Objective(truncate=1.5), Objective(clip_low=0.2, clip_high=0.28), Objective(by_std=True, kl=0.04),
]  # fmt: skip
CASES = {
    "mixed": (4, 3, lambda place, draw: float(draw.random() < 0.5)),
    "many values, one group all equal": (3, 4, lambda place, draw: 0.3 if place == 1 else draw.random()),
    "groups of one": (5, 1, lambda place, draw: float(place)),
}


@pytest.mark.parametrize(
    "case, objective",
    [("mixed", objective) for objective in VARIANTS]
    + [(case, VARIANTS[i]) for case in list(CASES)[1:] for i in (0, -1)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_gradient_is_a_plain_unbatched_one(monkeypatch, case, objective):
    """Of a step with padding, forced tokens, groups of one sample and of equal rewards. A KL term's is zero here: the
    reference is the model itself, and without an advantage there is no update.
    """
    model, (groups, size, rewards) = tiny.model(), CASES[case]
    samples = made_up(model, groups, size, rewards)
    expected = plain_gradient(model, samples, size, objective, limit=12)
    model.zero_grad()
    found = []
    monkeypatch.setattr(rl, "set_rates", lambda stage: None)
    monkeypatch.setattr(rl, "update", lambda *args: found.extend(p.grad.clone() for p in model.parameters()))
    stage = SimpleNamespace(hardware=cpu(), optimizer=model.setup_optimizer(), scaler=None, model=model)
    reference = copy(model) if objective.kl else None
    practising = Practising(None, None, WORDS, None, objective, size, 5, 12, 0, reference=reference)
    loss, *_ = practising.learn(stage, model, samples, len(samples), sum(sample.learnt for sample in samples))
    if case == "groups of one":
        assert not found and loss == 0 and all(not gradient.any() for gradient in expected)  # no update at all
        return
    scale = max(gradient.abs().max() for gradient in expected)
    assert scale > 1e-4
    for got, wanted in zip(found, expected):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * max(float(scale), 1e-2))


def cpu(world: int = 1) -> Hardware:
    return SimpleNamespace(device=torch.device("cpu"), world=world, rank=0, is_main=True)  # type: ignore[return-value]


def test_no_rank_updates_where_the_loss_of_another_is_no_finite_number(monkeypatch):
    """Or it would wait for the other's gradients."""
    model, losses = tiny.model(), []
    monkeypatch.setattr(rl, "set_rates", lambda stage: None)
    monkeypatch.setattr(rl, "any_rank", lambda flag, hardware: flag)
    monkeypatch.setattr(rl.dist, "all_reduce", lambda loss: loss.add_(float("nan")))
    monkeypatch.setattr(rl, "update", lambda stage, loss: losses.append(loss))
    stage = SimpleNamespace(hardware=cpu(world=2), optimizer=model.setup_optimizer(), scaler=None, model=model)
    samples = made_up(model, 1, 4, lambda place, draw: draw.random())
    practising = Practising(None, None, WORDS, None, Objective(updates=2), 4, 5, 12, 0)
    loss, *_ = practising.learn(stage, model, samples, 8, 2 * sum(sample.learnt for sample in samples))
    assert [loss, *losses] == pytest.approx([float("nan")] * 2, nan_ok=True)


@pytest.mark.parametrize("spoilt", [1, 2, 3])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_an_update_that_changes_nothing_ends_its_step_which_counts_as_bad(monkeypatch, spoilt, what):
    """Whichever of three it is: those before it stay taken, and the trainer hears of it."""
    model, taken = tiny.model(), []
    monkeypatch.setattr(rl, "set_rates", lambda stage: None)
    losses = rl.token_losses

    def spoil(logp, batch, objective):
        value = losses(logp, batch, objective)
        if len(taken) + 1 == spoilt and what == "gradient":
            value.register_hook(lambda gradient: gradient * float("inf"))
        return value * float("nan") if len(taken) + 1 == spoilt and what == "loss" else value

    def update(stage, loss):
        before = [p.clone() for p in model.parameters()]
        step.update(stage, loss)
        taken.append(any(not torch.equal(p, old) for p, old in zip(model.parameters(), before)))

    monkeypatch.setattr(rl, "token_losses", spoil)
    monkeypatch.setattr(rl, "update", update)
    stage = SimpleNamespace(hardware=cpu(), optimizer=model.setup_optimizer(), scaler=None, model=model)
    samples = made_up(model, 1, 4, lambda place, draw: draw.random())
    practising = Practising(None, None, WORDS, None, Objective(updates=3), 4, 5, 12, 0)
    loss, *_ = practising.learn(stage, model, samples, 4, sum(sample.learnt for sample in samples))
    assert taken == [True] * (spoilt - 1) + [False]
    said = []
    bad = SimpleNamespace(name="rl", state=State(), optimizer=stage.optimizer, scaler=None, bad=2, saved_step=0)
    trainer.judge(bad, SimpleNamespace(note=said.append), Outcome(loss, False, False, None), known=True)
    assert bad.bad == 3 and bad.state.skipped == 1 and len(said) == 1 and stage.optimizer.finish_step() is None


@pytest.mark.parametrize("moved", [False, True])
def test_a_step_without_a_signal_changes_nothing_before_the_first_update(monkeypatch, moved):
    """With a KL term all samples are run; its gradient from the reference itself would be rounding, made large."""
    model = tiny.model()
    reference = copy(model)
    if moved:
        with torch.no_grad():
            model.lm_head.weight.add_(1e-3 * torch.randn(model.lm_head.weight.shape))
    before = [p.clone() for p in model.parameters()]
    monkeypatch.setattr(rl, "set_rates", lambda stage: None)
    stage = SimpleNamespace(hardware=cpu(), optimizer=model.setup_optimizer(), scaler=None, model=model)
    samples = made_up(model, 2, 4, lambda place, draw: 0.0)
    practising = Practising(None, None, WORDS, None, Objective(kl=0.1, updates=2), 4, 5, 12, 0, reference=reference)
    practising.learn(stage, model, samples, 8, sum(sample.learnt for sample in samples))
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before)) == moved


def test_a_second_update_is_clipped_and_drawn_back_to_the_reference():
    """The gain's slope is A·ratio within the clip and 0 beyond it; k3's is 1 − exp(reference − now)."""
    sample = Sample(0, 1, [1, 2, 3, 4], [True] * 3, [-1.0] * 3, [], "stop", 1.0)
    batch = rows([sample], torch.tensor([2.0]), torch.tensor([0.5]), torch.device("cpu"))
    batch.old = torch.full((1, 3), -1.0)
    now = torch.tensor([[-1.0, -0.5, -2.0]], requires_grad=True)  # ratios 1, 1.65, 0.37
    rl.token_losses(now, batch, Objective(clip_low=0.2, clip_high=0.28)).sum().backward()
    torch.testing.assert_close(now.grad, -0.5 * 2 * torch.tensor([[1.0, 0.0, torch.exp(torch.tensor(-1.0))]]))
    now.grad, batch.advantage[:] = None, 0.0
    batch.reference = torch.tensor([[-1.5, -0.5, -1.0]])
    rl.token_losses(now, batch, Objective(kl=0.1)).sum().backward()
    torch.testing.assert_close(now.grad, 0.5 * 0.1 * (1 - torch.exp(batch.reference - now.detach())))


def test_advantages_of_equal_rewards_are_exactly_zero():
    rewards = torch.tensor([[0.1, 0.1, 0.1], [1.0, 0.0, 1.0]], dtype=torch.float64)
    for by_std in (False, True):
        found = advantages(rewards, by_std)
        assert not found[0].any() and found[1].sum().abs() < 1e-12
    assert abs(found[1][1] + 2**0.5) < 1e-5


# ---- rollouts


def test_a_sample_is_the_same_in_any_company_and_its_tokens_are_as_likely_to_the_trainer(model):
    together, alone = rolled(model, ASKED), rolled(model, ASKED[2:3], slots=2)
    assert [one.tokens for one in together if one.place == 2] == [one.tokens for one in alone]
    assert len({tuple(one.tokens) for one in together}) > 4  # the samples of a question differ
    assert rolled(model, ASKED[:1], step=1)[0].tokens != together[0].tokens
    assert {one.ended for one in together} == {"stop", "length"} and {one.reward for one in together} == {0.0, 1.0}
    forced = [one for one in together if not all(one.drawn)]
    assert forced and all(len(one.drawn) == len(one.logprobs) == len(one.tokens) - one.prompt for one in together)
    special = Run.open("a").tokenizer().special
    for one in forced:
        output = one.tokens[one.prompt :]
        at = output.index(special["<|output_start|>"])
        end = output.index(special["<|output_end|>"]) + 1
        assert one.drawn[:at] == [True] * at and not any(one.drawn[at:end]) and all(one.drawn[end:])
    mismatch = Mismatch()
    batch = rows(together, torch.zeros(16), torch.zeros(16), torch.device("cpu"))
    with torch.no_grad():
        batch.old = -model(batch.inputs, batch.targets, loss_reduction="none")
    mismatch.add(batch, 0.0)
    assert mismatch.largest < 1e-3 and mismatch.tokens == sum(one.learnt for one in together)


def test_the_engine_goes_on_with_other_weights_and_forgets_the_prefixes(model):
    other = copy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    engine, prompt, asked = Engine(copy(model), 2), list(range(2, 40)), Sampling(0, logprobs=0)
    before, again, wanted = (Request(prompt, 8, asked) for _ in range(3))
    list(engine.stream(before))
    engine.load(other.state_dict())
    assert list(engine.stream(again)) == list(Engine(copy(other), 2).stream(wanted)) and again.cached == 0
    assert again.logprobs == wanted.logprobs != before.logprobs
    engine.submit(Request(prompt, 2, asked))
    with pytest.raises(ValueError, match="while requests are running"):
        engine.load(other.state_dict())
    compiled = Engine(copy(model), 2)
    compiled._decode.compiled = {True: None, False: None}
    with pytest.raises(ValueError, match="compiled for the weights"):
        compiled.load(other.state_dict())


def test_held_out_people_frames_and_sums_are_not_practised():
    practised_, asked = (
        [question.messages[0]["content"] for question in questions]
        for questions in (PRACTISED, TASKS["word_sums"].all_questions())
    )
    number = re.compile(r"\d+")
    numbers = lambda texts: {tuple(sorted(number.findall(text))) for text in texts}
    names = lambda texts: {" ".join(text.split()[:2]) for text in texts}
    frame = lambda text: re.sub(
        "|".join(THINGS), "things", number.sub("0", re.sub("[A-Z][a-z]+ [A-Z][a-z]+", "N", text))
    )
    for of in (numbers, names, lambda texts: {*map(frame, texts)}):
        assert not of(practised_) & of(asked)
    assert len({*map(frame, practised_)}) == 15 and len({*map(frame, asked)}) == 5 and len(set(asked)) > 590


def test_every_question_is_practised_once_before_any_twice():
    def order(seed):
        questions = Questions(WORDS, PRACTISED[:10], seed)
        return [PRACTISED.index(q) for step in range(5) for q in questions.of_step(step, 4)]

    found = order(1)
    assert sorted(found[:10]) == sorted(found[10:]) == list(range(10)) and found[:10] != found[10:]
    assert found == order(1) != order(2)


# ---- the stage


def results_of(home):
    """(what the log says of each step but times, the last checkpoint's tensors)."""
    rows = read_log(home / "runs" / "a" / "rl" / "log.jsonl")
    kept = [{k: v for k, v in row.items() if "seconds" not in k and k != "tok_per_s"} for row in rows]
    last = Run.open("a").checkpoint("rl")
    return kept, {part: last.tensors(part) for part in ("model", "optimizer", "loader")}


def assert_same(one, two):
    assert one[0] == two[0]
    for part in one[1]:
        assert one[1][part].keys() == two[1][part].keys()
        assert all(torch.equal(one[1][part][name], value) for name, value in two[1][part].items()), part


@pytest.fixture
def scripts(tmp_path):
    made = killed.Scripts(tmp_path)
    yield made
    made.close()


def kills(home, scripts, moments):
    """Trains once in peace, and once killed at each of these file operations, or seconds; the results."""
    scripts.ready()
    assert scripts.run("chat_rl", *FLAGS) == 0, scripts.said.read_text()
    peace = results_of(home)
    shutil.rmtree(home / "runs" / "a" / "rl")
    ended = [scripts.run("chat_rl", *FLAGS, folder=str(home), **when) for when in moments]
    assert scripts.run("chat_rl", *FLAGS) == 0, scripts.said.read_text()
    assert_same(peace, results_of(home))
    return peace, ended


def test_killed_and_resumed_it_has_the_same_rewards_and_weights(home, scripts, capsys):
    (rows_, tensors), ended = kills(home, scripts, [dict(operation=75)])
    assert ended == [-9]
    steps = [row for row in rows_ if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert any(row["mixed"] for row in steps) and all(0 < row["ratio_largest"] < 1e-3 for row in steps)
    assert [row["step"] for row in rows_ if "passes" in row] == [0, 2, 3]
    start = Run.open("a").checkpoint("sft").tensors("model")
    assert any(not torch.equal(start[name], value) for name, value in tensors["model"].items())
    assert tiny.call("chat_rl", *FLAGS) == 0 and "already trained" in capsys.readouterr().out
    assert tiny.call("chat_rl", *FLAGS, "--seed=1") == 2 and "another plan" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_at_thirty_random_moments(home, scripts):
    """Moments are parts of what an undisturbed run takes here; each time that one ends whole, the next starts over."""
    draw, begun = random.Random(5), time.perf_counter()
    peace, _ = kills(home, scripts, [])
    took = (time.perf_counter() - begun) / 2  # two whole runs
    shutil.rmtree(home / "runs" / "a" / "rl")
    ended = []
    for _ in range(30):
        ended.append(scripts.run("chat_rl", *FLAGS, seconds=draw.uniform(0.02, 0.8) * took))
        if ended[-1] == 0:
            assert_same(peace, results_of(home))
            shutil.rmtree(home / "runs" / "a" / "rl")
    assert scripts.run("chat_rl", *FLAGS) == 0, scripts.said.read_text()
    assert_same(peace, results_of(home))
    assert ended.count(-9) > 10, ended


@pytest.mark.slow
def test_two_ranks_do_what_one_does(home):
    """They draw the same samples, and learn the same from them but for rounding."""
    assert tiny.call("chat_rl", *FLAGS) == 0
    one = results_of(home)
    shutil.rmtree(home / "runs" / "a" / "rl")
    command = [sys.executable, "-m", "scripts.launch", "--gpus", "2", "scripts.chat_rl", "--", *FLAGS]
    subprocess.run(command, check=True, cwd=killed.ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"))
    two = results_of(home)
    for a, b in zip(one[0], two[0], strict=True):
        assert a["step"] == b["step"] and a.get("groups") == b.get("groups") and a.get("lengths") == b.get("lengths")
    for name, value in one[1]["model"].items():
        if name != "backout_lambda":  # of two layers it scales what is normed next: its gradient is rounding alone
            torch.testing.assert_close(two[1]["model"][name], value, rtol=1e-3, atol=1e-4)


def test_real_questions_of_gsm8k_go_through_the_whole_stage(home, shared, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("NANOCHAT_HUB_ROOT", str(shared / "data" / "hub"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    asked = {question.messages[0]["content"] for question in PRACTICE["gsm8k"].train()}
    assert len(asked) > 7400 and not asked & {q.messages[0]["content"] for q in TASKS["gsm8k"].all_questions()}
    flags = "--task=gsm8k --num-iterations=2 --questions=2 --num-samples=2 --eval-every=-1 --save-every=-1".split()
    assert tiny.call("chat_rl", *FLAGS, *flags) == 0
    first, one, two, last = read_log(home / "runs" / "a" / "rl" / "log.jsonl")
    assert (first["step"], last["step"], last["final"]) == (0, 2, True) and first["questions"] == 4
    assert one["reward"] == 0.0 and one["sampled_tokens"] > 0 and "greedy" in capsys.readouterr().out
    assert Run.open("a").checkpoint().meta["data"].startswith("hub gsm8k")  # the last stage's is taken by default
    assert tiny.call("report", "--run=a") == 0
    report = (home / "runs" / "a" / "report.md").read_text()
    assert "2 steps of 2 questions with 2 answers each, of gsm8k; rewarded: form; variants: none." in report
    assert "| held-out questions, n=4 | after 0 steps | after 2 steps |" in report and "| 0 | wrong, " in report
    for name, title in (("report_reward", "reward by step (mean of 10)"), ("report_pass", "held-out pass@1 by step")):
        assert f"![{title}]({name}.svg)" in report and "<polyline" in (home / "runs" / "a" / f"{name}.svg").read_text()


@pytest.mark.parametrize(
    "flags, said",
    [
        (dict(questions=3), "--questions 3 cannot be divided among 2 ranks"),
        (dict(task="poems"), "--task is 'poems'; RL can practise gsm8k or word_sums"),
    ],
)
def test_what_makes_no_sense_is_refused(flags, said):
    with pytest.raises(UserError, match=said):
        RLFlags(**flags).check(world=2)


def test_the_cache_of_rollouts_leaves_room_for_training():
    config = GPTConfig()  # 72 MiB of keys and values for each answer, in bfloat16
    card = SimpleNamespace(memory=24 << 30, dtype=torch.bfloat16, world=1)
    assert slots(RLFlags(), config, card) == 6 * 1024 // 72
    assert slots(RLFlags(rollout_batch_size=256), config, card) == 256
    assert slots(RLFlags(questions=2, num_samples=4, eval_questions=3, eval_samples=3), config, card) == 9
    assert slots(RLFlags(), config, SimpleNamespace(memory=80 << 30, dtype=torch.bfloat16, world=8)) == 128


def test_refusals_of_the_scripts(home, capsys):
    for argv, said in (
        (["chat_rl", "--run=nobody"], "nobody"),
        (["chat_rl", "--run=a", "--num-samples=1"], "--num-samples is 1"),
        (["chat_rl", "--run=a", "--source=mid"], "no finished mid"),
        (["chat_sft", "--run=a", "--source=sft", "--word-problems=101"], "--word-problems is 101"),
        (["chat_sft", "--run=a", "--source=sft", "--data=x.jsonl", "--word-problems=2"], "--word-problems 2"),
    ):
        assert tiny.call(*argv) == 2
        problem = capsys.readouterr().err
        assert problem.startswith("error: ") and said in problem and problem.count("\n") == 1, problem
    assert not (home / "runs" / "a" / "rl").exists()
    json.loads((home / "runs" / "a" / "sft" / "step_000040" / "meta.json").read_text())
