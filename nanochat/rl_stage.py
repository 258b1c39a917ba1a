"""The stage of reinforcement learning put together, from flags: rl.py in the place of batches and bits per byte.

It starts from SFT's model, with the learning rates of base training times --init-lr-frac and the optimizer's moments at
zero; the rate falls to zero over the stage. Which questions a step asks follows from the seed and the step's number.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from nanochat.chat_stages import PROMPTS
from nanochat.checkpoint import same_version
from nanochat.consensus import same_checkpoint
from nanochat.data.loader import conversation_encoder
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.evaluate.chat_tasks import fingerprint
from nanochat.flags import MANY, SEEDS, flag, number
from nanochat.gpt import GPTConfig
from nanochat.hardware import Hardware
from nanochat.hardware import setup as look_at_hardware
from nanochat.one_writer import only_writer
from nanochat.policy_gradient import NORMALIZED, Objective
from nanochat.ranks import first_alone
from nanochat.recipe import Schedule
from nanochat.rl import Practising
from nanochat.run import Run
from nanochat.stages import Setup, copy_of, run_stage
from nanochat.tasks import Question
from nanochat.tasks.practice import PRACTICE, REWARDS, Practice
from nanochat.trainer import Settings, Stage

USUAL_ROLLOUTS = 256
CACHE = 0.25  # of a GPU's memory: the model that is trained and its engine's copy want the rest


@dataclass
class RLFlags:
    """Flags of chat_rl. Where a step is named, it is an optimizer step on one batch of rollouts."""

    run: str = flag("speedrun", "name of the run: its folder under $NANOCHAT_BASE_DIR/runs", "--model-tag", "-g")
    task: str = flag("", f"{' | '.join(PRACTICE)} (default: by what the model was trained on)", "-a")
    reward: str = flag("right", "what is rewarded: a right answer, or the form of one (can be hacked)", choices=REWARDS)
    device_type: str = flag("", "cuda | cpu | mps (default: the best there is)")
    fresh: bool = flag(False, "forget what this stage has trained so far")
    wandb: bool = flag(False, "also log to Weights & Biases (pip install wandb)")
    profile: int = number(0, 0, 10_000, "record so many steps, once it is warm, to <run>/rl/profile/ (0: none)")
    source: str = flag("sft", "stage to start from", "-i")
    num_iterations: int = number(-1, 1, MANY, "steps (-1: every question once)")
    questions: int = number(16, 1, 1 << 16, "questions of a step, all ranks together")
    num_samples: int = number(16, 2, 4096, "answers to each of them, drawn at temperature 1", "-n")
    max_new_tokens: int = number(-1, 1, 1 << 20, "longest answer, in tokens (-1: the task's, at most 256)", "-m")
    rollout_batch_size: int = number(
        -1, 1, 4096, "answers written at a time (-1: 256, or as many as a quarter of the memory has room for)", "-b"
    )
    device_batch_size: int = number(-1, 1, 1 << 16, "answers learnt from at a time (-1: as in base training)")
    init_lr_frac: float = number(0.05, 0.0, 1e3, "learning rates at the start, as a fraction of base training's")
    std: bool = flag(
        False, "divide advantages by the standard deviation of their question's rewards (GRPO, arXiv:2402.03300)"
    )
    normalize: str = flag(
        "token",
        "mean over tokens (DAPO, arXiv:2503.14476), over samples' means (GRPO), by a constant (Dr. GRPO, 2503.20783)",
        choices=NORMALIZED,
    )
    updates: int = number(
        1, 1, 1000, "updates from each batch of rollouts; more than 1 is off-policy, and wants a clip"
    )
    clip_low: float = number(
        0.0, 0.0, 0.99, "no gain below 1 − so much times the old probability (PPO, arXiv:1707.06347: 0.2; 0: no clip)"
    )
    clip_high: float = number(
        0.0, 0.0, 100.0, "no gain above 1 + so much times it (clip-higher, DAPO: 0.28; 0: no clip)"
    )
    kl: float = number(0.0, 0.0, 100.0, "weight of the KL divergence from the model at the start (GRPO: 0.04)")
    truncate: float = number(
        0.0,
        0.0,
        1000.0,
        "weigh tokens by trainer's over engine's probability, up to so much "
        "(truncated importance sampling, Yao et al. 2025: 2; 0: no)",
    )
    eval_every: int = number(
        60, 1, MANY, "ask held-out questions every so many steps (-1: only first and last)", also=-1
    )
    eval_questions: int = number(128, 0, MANY, "so many of them, at most (0: all)")
    eval_samples: int = number(8, 1, 1000, "answers to each: gives pass@1 to pass@k")
    sample_every: int = number(-1, 1, MANY, "show answers every so many steps (-1: only at the end)")
    save_every: int = number(-1, 1, MANY, "checkpoint every so many steps (-1: with each evaluation)")
    seed: int = number(42, *SEEDS, "of the questions' order and of all draws")

    def objective(self) -> Objective:
        given = vars(self)
        return Objective(by_std=self.std, **{f.name: given[f.name] for f in fields(Objective) if f.name in given})

    def check(self, world: int) -> None:
        """Raises UserError for what no range of a flag says."""
        if self.questions % world:
            raise UserError(f"--questions {self.questions} cannot be divided among {world} ranks")
        if self.task and self.task not in PRACTICE:
            raise UserError(f"--task is {self.task!r}; RL can practise {' or '.join(PRACTICE)}")


@dataclass
class Questions:
    """The questions that are practised, in place of a source of data: each once, in an order by the seed, then again
    in another.
    """

    practice: Practice
    all: list[Question]
    seed: int

    def __post_init__(self) -> None:
        self.name = f"{self.practice.origin} {self.practice.task.name}"
        self.fingerprint = fingerprint(self.all)

    def units(self, split: str) -> int:
        return 1

    def load(self, split: str, unit: int) -> list[Any]:
        return self.all

    def of_step(self, step: int, count: int) -> list[Question]:
        n, begun = len(self.all), step * count
        epochs = range(begun // n, (begun + count - 1) // n + 1)
        order = np.concatenate([np.random.default_rng([self.seed, epoch]).permutation(n) for epoch in epochs])
        return [self.all[i] for i in order[begun % n : begun % n + count]]


def run_rl(flags: RLFlags, watch: Callable[[Stage], Callable[[], None]] | None = None) -> None:
    """Trains stage "rl" as the flags say. `watch`: as in Setup."""
    hardware = look_at_hardware(flags.device_type)
    flags.check(hardware.world)
    run = Run.open(flags.run)
    with only_writer(run, hardware):
        _train(flags, run, hardware, watch)


def _train(flags: RLFlags, run: Run, hardware: Hardware, watch: Callable[[Stage], Callable[[], None]] | None) -> None:
    tokenizer = run.tokenizer()
    parent = same_checkpoint(lambda: run.checkpoint(flags.source))
    parent.check_tokenizer(tokenizer)
    with same_version(parent.folder):
        name = flags.task or ("word_sums" if parent.meta["data"].startswith("microworld") else "gsm8k")
        rows = flags.device_batch_size if flags.device_batch_size > 0 else parent.meta["settings"]["device_batch_size"]
        rates = {key: value * flags.init_lr_frac for key, value in parent.meta["rates"].items()}
    practice, objective = PRACTICE[name], flags.objective()
    asked = Questions(practice, first_alone(practice.train, hardware), flags.seed)
    limit = flags.max_new_tokens if flags.max_new_tokens > 0 else min(practice.task.limit, 256)
    steps = flags.num_iterations if flags.num_iterations > 0 else max(1, len(asked.all) // flags.questions)
    torch.manual_seed(flags.seed)  # nothing draws from it, but its state is in the checkpoint
    model = parent.model(hardware.device, hardware.dtype)
    length = model.config.sequence_len
    at_once = rows * length * hardware.world  # the loop wants a size of batch, and a step of RL has none
    save = flags.save_every if flags.save_every > 0 else flags.eval_every
    settings = Settings(steps, rows, length, at_once, flags.eval_every, save, flags.sample_every)
    with same_version(parent.folder):
        optimizer = model.setup_optimizer(**rates, weight_decay=0.0)
    schedule = Schedule(steps, 0, 1.0, 0.0, momentum_start=0.95, momentum_peak=0.95, momentum_end=0.95)
    decides = dict(
        vars(objective),
        task=name,
        reward=flags.reward,
        questions=flags.questions,
        num_samples=flags.num_samples,
        max_new_tokens=limit,
        seed=flags.seed,
    )

    def adapt(stage: Stage) -> None:
        engine = Engine(copy_of(model, model.state_dict()), slots(flags, model.config, hardware))
        engine.warm()  # on a GPU: graphs, which see other weights loaded in place
        practising = Practising(
            engine, tokenizer, practice, lambda step: asked.of_step(step, flags.questions), objective,
            flags.num_samples, rows, limit, flags.seed, flags.reward, flags.eval_questions, flags.eval_samples,
            copy_of(model, model.state_dict()).requires_grad_(False) if objective.kl else None,
        )  # fmt: skip
        stage.batches, stage.take, stage.examine = lambda state: [], practising.step, practising.examine

    run_stage(
        Setup(
            name="rl",
            run=run,
            hardware=hardware,
            tokenizer=tokenizer,
            source=asked,
            encode=conversation_encoder(tokenizer, masked=True),
            model=model,
            optimizer=optimizer,
            schedule=schedule,
            settings=settings,
            rates=parent.meta["rates"],
            plan=dict(vars(schedule), parent=parent.fingerprint, **rates, **decides),
            eval_tokens=length,
            prompts=[*PROMPTS, asked.all[0].messages],
            compile="answers are of many lengths",
            wandb=flags.wandb,
            tune=False,
            spike_guard=False,
            watch=watch,
            fresh=flags.fresh,
            work=f"{flags.questions} questions x {flags.num_samples} answers",
            adapt=adapt,
        )
    )


def slots(flags: RLFlags, config: GPTConfig, hardware: Hardware) -> int:
    """Answers that one rank writes at once, for each of which keys and values of a whole context are kept."""
    each = 2 * config.n_layer * config.sequence_len * config.n_kv_head * config.head_dim * hardware.dtype.itemsize
    usual = max(1, min(USUAL_ROLLOUTS, int(CACHE * hardware.memory) // each))
    wanted = flags.rollout_batch_size if flags.rollout_batch_size > 0 else usual
    if not flags.eval_questions:
        return wanted
    asked = (flags.questions * flags.num_samples, flags.eval_questions * flags.eval_samples)
    return min(wanted, -(-max(asked) // hardware.world))
