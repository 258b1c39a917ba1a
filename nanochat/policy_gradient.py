"""From rewards to a loss: policy gradient on tokens that the model itself chose.

An answer's advantage is its reward minus the mean of its question's answers; the loss is −Σ weight · advantage ·
log p(token) over the tokens chosen. What a tool's answer forced is context and not learnt. That is REINFORCE (Williams,
1992) with the group's mean as baseline, no KL term and no clipping: nanochat's choice. `Objective` has the literature's
variants; each is a line of `advantages`, `weights` or `token_losses`.

Letters: Q questions of a step, S samples of each, B rows of a micro-batch, T their tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.data.packing import IGNORED
from nanochat.rollouts import Sample

NORMALIZED = ("token", "sequence", "constant")


@dataclass(frozen=True)
class Objective:
    """How rewards become a loss; 0 or False leaves a variant out.

    by_std: advantages are divided by their group's standard deviation (GRPO, Shao et al., arXiv:2402.03300).
    normalize: the mean is over all tokens (DAPO, Yu et al., arXiv:2503.14476; nanochat), over the samples' own means
    (GRPO), or a sum over a constant length (Dr. GRPO, Liu et al., arXiv:2503.20783).
    clip_low, clip_high: the gain stops outside 1 − low … 1 + high times the old probability (PPO, Schulman et al.,
    arXiv:1707.06347; a higher upper end is DAPO's). With a single update of each batch nothing is ever outside.
    kl: weight of the KL divergence from the model that RL began with, by Schulman's estimator k3 (as GRPO).
    truncate: a token counts min(p_trainer / p_engine, truncate) times: truncated importance sampling (Yao et al., Your
    Efficient RL Framework Secretly Brings You Off-Policy RL Training, 2025).
    updates: optimizer updates from each batch of rollouts; on-policy is 1.
    """

    by_std: bool = False
    normalize: str = "token"
    clip_low: float = 0.0
    clip_high: float = 0.0
    kl: float = 0.0
    truncate: float = 0.0
    updates: int = 1


def advantages(rewards: Tensor, by_std: bool) -> Tensor:
    """Of rewards (Q, S): what each is above its group's mean. Exactly 0 where a group's are all equal, or just one."""
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, correction=0, keepdim=True)
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return torch.where(equal, 0.0, (rewards - mean) / (std + 1e-6 if by_std else 1.0))


def weights(learnt: Tensor, normalize: str, limit: int, samples: int, tokens: int) -> Tensor:
    """(n,): what each token of a sample counts. learnt (n,): how many of its tokens are learnt, at most limit.

    samples, tokens: of the whole step, all ranks together.
    """
    if normalize == "token":
        return torch.full_like(learnt, 1 / tokens)
    return 1 / samples / (learnt if normalize == "sequence" else torch.full_like(learnt, limit))


@dataclass
class Rows:
    """A micro-batch: samples of one padded length. Log-probabilities are in nats, 0 where nothing is learnt."""

    inputs: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, −1 where nothing is learnt
    engine: Tensor  # (B, T) float32: the engine's log-probabilities
    advantage: Tensor  # (B, 1) float32
    weight: Tensor  # (B, 1) float32
    old: Tensor | None = None  # (B, T): the trainer's, before the first update
    reference: Tensor | None = None  # (B, T): of the model that RL began with


def rows(samples: Sequence[Sample], advantage: Tensor, weight: Tensor, device: torch.device) -> Rows:
    """advantage and weight: (B,) of these samples."""
    T = max(len(sample.tokens) for sample in samples) - 1
    inputs = torch.zeros((len(samples), T), dtype=torch.int64)
    targets, engine = torch.full_like(inputs, IGNORED), torch.zeros(inputs.shape)
    for i, sample in enumerate(samples):
        tokens, first, n = torch.tensor(sample.tokens), sample.prompt - 1, len(sample.tokens) - 1
        drawn = torch.tensor(sample.drawn)
        inputs[i, :n] = tokens[:-1]
        targets[i, first:n] = torch.where(drawn, tokens[sample.prompt :], IGNORED)
        engine[i, first:n] = torch.where(drawn, torch.tensor(sample.logprobs), 0.0)
    parts = (inputs, targets, engine, advantage[:, None].float(), weight[:, None].float())
    return Rows(*(part.to(device) for part in parts))


def token_losses(logp: Tensor, batch: Rows, objective: Objective) -> Tensor:
    """(B, T), whose sum over all rows is the step's loss. logp (B, T): the trainer's now, with its gradient."""
    assert batch.old is not None
    ratio = torch.exp(logp - batch.old)  # 1 in the first update: its gradient is that of logp
    gain = batch.advantage * ratio
    if objective.clip_low or objective.clip_high:
        low, high = objective.clip_low, objective.clip_high
        gain = torch.minimum(gain, batch.advantage * ratio.clamp(1 - low if low else None, 1 + high if high else None))
    if objective.truncate:
        gain = gain * torch.exp(batch.old - batch.engine).clamp_max(objective.truncate)
    if batch.reference is not None:
        gap = batch.reference - logp
        gain = gain - objective.kl * (torch.exp(gap) - gap - 1)
    return -batch.weight * gain * (batch.targets >= 0)


@dataclass
class Mismatch:
    """|p_trainer / p_engine − 1| over the tokens that were learnt from; how many had a ratio that was truncated."""

    largest: float = 0.0
    total: float = 0.0
    truncated: int = 0
    tokens: int = 0

    def add(self, batch: Rows, truncate: float) -> None:
        assert batch.old is not None
        ratio = torch.exp(batch.old - batch.engine)[batch.targets >= 0]
        off = (ratio - 1).abs()
        self.largest = max(self.largest, off.max().item())
        self.total += off.sum().item()
        self.truncated += int((ratio > truncate).sum()) if truncate else 0
        self.tokens += off.numel()


def mismatch_row(ranks: Sequence[Mismatch]) -> dict[str, float]:
    """Of all ranks together, for the log."""
    tokens = sum(one.tokens for one in ranks)
    return dict(
        ratio_largest=max(one.largest for one in ranks),
        ratio_mean=sum(one.total for one in ranks) / tokens,
        ratio_truncated=sum(one.truncated for one in ranks) / tokens,
    )
