"""What a model costs: parameters, FLOPs and memory, counted from its shapes."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from kernels import tuned
from kernels.linear_cross_entropy import CHUNK_LOGITS
from nanochat.gpt import GPT, GPTConfig, Linear


def meta_model(config: GPTConfig) -> GPT:
    """The model without storage: shapes only."""
    with torch.device("meta"):
        return GPT(config)


def parameter_counts(config: GPTConfig) -> dict[str, int]:
    """Parameters by part, and their "total"."""
    return dict(_counts(config))


@cache
def _counts(config: GPTConfig) -> dict[str, int]:
    counts = dict(wte=0, value_embeds=0, lm_head=0, transformer_matrices=0, scalars=0)
    for name, p in meta_model(config).named_parameters():
        part = (
            "wte"
            if name.startswith("transformer.wte")
            else "transformer_matrices"
            if name.startswith("transformer.h")
            else name.split(".")[0]
        )
        counts[part if part in counts else "scalars"] += p.numel()
    return {**counts, "total": sum(counts.values())}


def scaling_params(config: GPTConfig) -> int:
    """The parameters that scaling laws are stated in: the blocks' matrices and the head."""
    counts = parameter_counts(config)
    return counts["transformer_matrices"] + counts["lm_head"]


@cache
def linear_params(config: GPTConfig) -> int:
    """Weights that every token is multiplied by: those of all Linears."""
    return sum(m.weight.numel() for m in meta_model(config).modules() if isinstance(m, Linear))


def flops_per_token(config: GPTConfig) -> int:
    """Training FLOPs per token as nanochat counts: 6 per parameter of a Linear, 12·H·D·min(window, T) per layer.

    Causality does not halve attention here and embeddings are free; see PaLM, arXiv:2204.02311, appendix B.
    """
    linears = linear_params(config)
    attention = 0
    for layer in range(config.n_layer):
        window = config.window(layer)
        keys = config.sequence_len if window is None else min(window, config.sequence_len)
        attention += 12 * config.n_head * config.head_dim * keys
    return 6 * linears + attention


def attended(config: GPTConfig, short: int | None = None) -> float:
    """Pairs of query and key per token, summed over the layers, exactly: causal, and within the window.

    In a window of W a query sees its own key and the W before it. `short`: a short window, where it is not the
    config's own.
    """
    T, pairs = config.sequence_len, 0.0
    for layer in range(config.n_layer):
        window = config.window(layer)
        most = T if window is None else min((short or window) + 1, T)  # keys of a query
        pairs += (most * (most + 1) / 2 + (T - most) * most) / T
    return pairs


def training_flops(config: GPTConfig) -> dict[str, float]:
    """Training FLOPs per token, counted in the three ways in which a share of the peak is given.

    mfu: as nanochat counts. mfu_causal: attention only for the pairs that causality and windows leave. hfu: what is
    executed of that, with what the backward computes a second time: attention's Q·Kᵀ (FlashAttention,
    arXiv:2205.14135: 5 products where 4 give the gradients). Nothing else is: the head makes its gradients in forward.
    The optimizer's products are in none of them.
    """
    exact = config.n_head * config.head_dim * attended(config)
    linears = 6 * linear_params(config)
    return dict(mfu=flops_per_token(config), mfu_causal=linears + 12 * exact, hfu=linears + 14 * exact)


def decode_cost(
    config: GPTConfig, keys: Sequence[int], itemsize: int, of_weights: int | None = None
) -> tuple[int, int]:
    """(FLOPs, bytes) of one decode step: every row a token. keys: how many each row has, its token's own among them.

    The bytes are the least that must be read: each Linear's weights once, and each row's keys and values in the window.
    of_weights: bytes of a weight, where not `itemsize` as of the rest.
    """
    linears = linear_params(config)
    windows = [config.window(layer) for layer in range(config.n_layer)]
    seen = sum(count if window is None else min(window + 1, count) for window in windows for count in keys)
    flops = 2 * len(keys) * linears + 4 * config.n_embd * seen
    return flops, (of_weights or itemsize) * linears + itemsize * 2 * config.n_kv_head * config.head_dim * seen


# ---- memory of a training step
#
# Predicted by parts, from the shapes. What is kept from step to step is known; what a step adds is largest at one of a
# few moments, which are added up apart: at the head, where all activations are saved and a chunk of logits is made; in
# the first layers of the backward; at its end, where all gradients of a micro-batch are returned at once; in the
# optimizer; in a save. CUDA graphs keep the memory of the first three during the last two.
# profiling/compiled/memory.py counts the same in the code that torch.compile generates.

# Assumed, not counted: CUDA's context with loaded kernels and cuBLAS's workspace; NCCL's buffers, with several GPUs;
# and of what tensors take, the share that the allocator loses to rounding up and to holes.
CONTEXT, COMMUNICATION, SLACK = 600 << 20, 512 << 20, 0.03
ASSUMED = ("CUDA context", "NCCL", "allocator's slack")
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def training_memory(
    config: GPTConfig,
    tokens: int,
    world: int = 1,
    dtype: str = "bfloat16",
    fp8: str = "",
    kernels: str = "auto",
    device: str = "cuda",
    replayed: bool = True,
) -> dict[str, int]:
    """Predicted bytes of one rank's compiled training, by part, at the moment when most are needed; a sum is the peak.

    tokens: of a micro-batch on one rank, two or more of which make a step. dtype: of the activations. fp8: "",
    "current" or "delayed". kernels: "auto" where ours run, "torch" where PyTorch's do. device: "cuda" or "cpu".
    replayed: whether CUDA graphs keep a micro-batch's memory while the optimizer has its own (nanochat/replay.py).
    """
    step = _Step(config, tokens, world, dtype, fp8, kernels, device)
    size = lambda parts: sum(parts.values())
    moments = step.moments()
    after = max((moments.pop(name) for name in ("optimizer", "save")), key=size)
    most = max(moments.values(), key=size)
    both = {**most, **after} if replayed and device == "cuda" else max(most, after, key=size)
    parts = {**step.kept(), **both}
    if device == "cuda":
        slack = int(SLACK * sum(parts.values()))
        parts |= zip(ASSUMED, (CONTEXT, COMMUNICATION if world > 1 else 0, slack))
    return {name: size for name, size in parts.items() if size}


def training_bytes(config: GPTConfig, tokens: int, world: int = 1, **how: Any) -> int:
    """The sum of `training_memory`, which see."""
    return sum(training_memory(config, tokens, world, **how).values())


@cache
def _block_shapes(config: GPTConfig) -> Counter[tuple[int, ...]]:
    """How many matrices of each shape the blocks have."""
    return Counter(tuple(matrix.shape) for matrix in meta_model(config).transformer["h"].parameters())


@dataclass(frozen=True)
class _Step:
    """The terms of `training_memory`. Letters as in gpt.py, N tokens; e: bytes of an activation."""

    config: GPTConfig
    tokens: int
    world: int
    dtype: str
    fp8: str
    kernels: str
    device: str

    @property
    def e(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def ours(self) -> bool:
        """Whether our kernels run; PyTorch's everywhere else."""
        return self.device == "cuda" and self.kernels != "torch"

    @property
    def shadows(self) -> bool:
        """Whether weights are cast once a step, and the blocks' gradients added in a bank (trainer.runnable)."""
        return self.device == "cuda" and self.e == 2 and not self.fp8

    @property
    def table(self) -> int:
        """Bytes of an entry of the embedding tables, of its gradient and moments (GPT.set_dtype)."""
        return 4 if self.dtype == "float16" else self.e

    def _banks(self) -> list[tuple[int, int, int]]:
        """(K, m, n) of the blocks' matrices, by shape, with those that pad each bank so that the ranks share it."""
        return [(count + -count % self.world, m, n) for (m, n), count in _block_shapes(self.config).items()]

    def _sizes(self) -> tuple[int, int, int, int]:
        """Numbers: the blocks' matrices; the same with their padding; head; all tables."""
        counts = parameter_counts(self.config)
        banks = sum(math.prod(bank) for bank in self._banks())
        return counts["transformer_matrices"], banks, counts["lm_head"], counts["wte"] + counts["value_embeds"]

    def kept(self) -> dict[str, int]:
        """What is there between steps, with the gradients that the micro-batches of a step add to."""
        matrices, banks, head, tables = self._sizes()
        config, cuda = self.config, self.device == "cuda"
        return {
            "parameters": 4 * (banks + head) + self.table * tables,
            "gradients": 4 * (banks if cuda else matrices) + 4 * head + self.table * tables,
            "shadows": self.e * (matrices + head) if self.shadows else 0,
            "moments": self._moments(banks, head, tables) // self.world,
            "rotary tables, batch": config.sequence_len * config.head_dim * self.e + 16 * self.tokens * cuda,
        }

    def moments(self) -> dict[str, dict[str, int]]:
        """Bytes beside `kept`, by part, at each moment that may be the peak."""
        matrices, banks, head, tables = self._sizes()
        N, C, e, V = self.tokens, self.config.n_embd, self.e, self.config.padded_vocab_size
        saved = self.saved()
        largest = max(m * n for _, m, n in self._banks())
        # bytes of an entry of a matrix's gradient, as the backward returns it: nothing where products add to it
        gradient = (0 if self.ours else e) if self.shadows else 4
        rows = min(N, self._chunk())
        # With a single chunk, the partitioner leaves dW to the backward where the logits' gradient is smaller than it.
        late = N <= rows and N * e < 4 * C
        cuda = self.device == "cuda"
        return {
            "head": {
                "saved activations": saved,
                "head: dW": 0 if late else 4 * head,
                "head: dx": N * C * e,
                # its input and, but for a shadow, the weight, cast or rounded, and transposed too for fp8
                "head: x and weight": (N if self.shadows else N + V) * C * (2 if self.fp8 else e),
                # Logits become their gradient where they lie (ours), or beside them. In fp8 copies of it, both ways;
                # the partitioner keeps the last chunk's for the backward, where it adds that chunk's dW.
                "head: logits": rows * V * ((e if self.ours else 2 * e) + (2 if self.fp8 else 0)),
                # which is added to the others' in its product, but on a CPU, or in fp8
                "head: a chunk's dW": 0 if late or (cuda and not self.fp8) else 4 * head,
            },
            "backward": {
                "saved activations": saved,
                "head: dW": 0 if cuda else 4 * head,  # CUDA adds it to the kept gradient first of all
                # of the last layer: the gradients of h, q, k, v and of the stream before and after, less the head's dx
                # and the final norm's input, which are freed by then
                "backward's temporaries": N * (4 * C + 2 * C + self._heads()) * e,
                "gradients of a micro-batch": gradient * largest,
            },
            "backward's end": {
                # embeddings before and after their norm, the token before's, dx of the stream and of x0
                "saved activations": 5 * N * C * e,
                "head: dW": 0 if cuda else 4 * head * (2 if late else 1),
                "head: logits": rows * V * e if late else 0,
                "gradients of a micro-batch": gradient * matrices + (0 if cuda else 4 * tables),
            },
            "optimizer": {"optimizer": self._update(banks, head, tables)},
            # moments are gathered one at a time: the largest bank, or the head's
            "save": {"gather of a save": 4 * max(head, *map(math.prod, self._banks())) if self.world > 1 else 0},
        }

    def _moments(self, banks: int, head: int, tables: int) -> int:
        """The optimizer's state of all ranks: Muon has one moment (and a small variance), AdamW two."""
        return 4 * banks + 8 * head + 2 * self.table * tables

    def _heads(self) -> int:
        """Channels of q, k and v together."""
        return (self.config.n_head + 2 * self.config.n_kv_head) * self.config.head_dim

    def _chunk(self) -> int:
        """Tokens whose logits are made at a time."""
        V = self.config.vocab_size
        if self.device == "cpu":
            return max(64, CHUNK_LOGITS // V // 64 * 64)
        return tuned.config("linear_cross_entropy", getattr(torch, self.dtype), V, torch.device("meta"))["rows"]

    def _update(self, banks: int, head: int, tables: int) -> int:
        """Muon's largest bank: the orthogonalised gradient, its next iterate, two products of the smaller side. With
        several ranks, their shares of the reduced gradients and copies of the new values on their way. On a CPU, stacks
        of the gradients, which elsewhere lie in banks.
        """
        orthogonal = 2 if self.dtype == "bfloat16" else 4  # bytes: MuonAdamW.dtype
        each = [K // self.world * (2 * m * n + 2 * min(m, n) ** 2) * orthogonal for K, m, n in self._banks()]
        values = 4 * banks + 4 * head + self.table * tables
        moving, stacks = 2 * values // self.world if self.world > 1 else 0, 0 if self.device == "cuda" else 4 * banks
        return max(each) + moving + stacks

    def saved(self) -> int:
        """Activations that forward keeps for the backward, as torch.compile's partitioner decides. The gradients that
        the head makes in forward are apart.
        """
        config, e, ours, fp8 = self.config, self.e, self.ours, bool(self.fp8)
        C, H, K, D, T = config.n_embd, config.n_head, config.n_kv_head, config.head_dim, config.sequence_len
        mixed = int(config.residual_mix)
        rms = 0 if ours else 4  # bytes of a row's 1/rms, which ours computes again
        total = 0  # bytes a token
        for layer in range(config.n_layer):
            # the stream after attention and what the MLP adds to it; PyTorch: the same mixed with x0, but where x is x0
            total += (2 + (mixed and not ours and layer > 0)) * C * e + 2 * rms
            # both normed, for the weights' gradients; of fp8, transposed copies, or made again from the streams
            total += 2 * C * (e if not fp8 else 1 if ours else 0)
            # q and k before their norm (PyTorch: turned, and 1/rms of each head) and after it; v
            total += (2 * H + 3 * K) * D * e + (H + K) * rms
            # attention's result and log-sum-exp; of fp8, a transposed copy for c_proj
            total += H * D * (e + fp8) + 4 * H
            window = config.window(layer)
            if not ours and window is not None and window < T - 1:
                total += H * D * e  # PyTorch's is put together of blocks of queries, which are kept as well
            # relu², from which relu is found; but float16 keeps h too, fp8 h and a copy of relu² (PyTorch: h alone)
            total += 4 * C * (2 * e if self.dtype == "float16" else e + (fp8 and ours))
            if config.has_value_embed(layer):
                total += K * e + K * D * e * (self.device == "cpu")  # the gate, and its rows, which CUDA reads again
                total += C * e * fp8  # the gate reads a slice of the normed stream, which so keeps all of it
        total += 2 * (C * e + rms)  # what the first norm and the last one read
        if config.smear:
            total += 2 * C * e + e  # normed, of which the gate reads a slice; the token before's; the gate
        weights = parameter_counts(config)["transformer_matrices"] if fp8 and ours else 0  # their transposed fp8 copies
        return total * self.tokens + weights
