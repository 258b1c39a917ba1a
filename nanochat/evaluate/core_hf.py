"""A causal language model of the Hugging Face Hub, by folder or name, asked as CORE asks ours: GPT-2 beside a nanochat.

One example at a time: what its sequences share goes through the model once, and its keys and values are repeated for
what the sequences end with. Logits are made for scored positions only, as far as a model's `logits_to_keep` allows.
Needs transformers: pip install transformers (the extra `hf`).
"""

import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat import optional
from nanochat.errors import UserError
from nanochat.evaluate.core_batches import Score
from nanochat.evaluate.core_prompts import Example, Ids, shared
from nanochat.files import short_hash

UNKNOWN_LIMIT = 1 << 15  # tokens, of a model that does not say how many it takes


def load(name: str, device: torch.device, dtype: torch.dtype) -> "HubModel":
    """A model and its own tokenizer, by folder or name. Raises UserError where they cannot be loaded."""
    try:
        transformers = optional.package("transformers", "AutoModelForCausalLM")
    except ImportError as missing:
        raise UserError(
            f"--hf needs the package transformers ({missing}): pip install transformers (or .[hf])"
        ) from None
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        return HubModel(model.to(device), transformers.AutoTokenizer.from_pretrained(name))
    except Exception as problem:  # no such folder or name, no network, weights of another kind
        said = " ".join(str(problem).split())[:200]
        raise UserError(f"--hf {name} could not be loaded ({type(problem).__name__}: {said})") from None


def label(name: str) -> str:
    """What a model is called where its results are shown: of a folder, its own name and a hash of where it is."""
    folder = Path(name).resolve()
    return f"{folder.name}-{short_hash(str(folder))}" if folder.is_dir() else name


class HubModel:
    """A causal LM and a tokenizer of transformers', as nanochat/evaluate/core.py asks them."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model.eval(), tokenizer
        limits = [getattr(model.config, key, None) for key in ("max_position_embeddings", "n_positions")]
        self.limit = next((limit for limit in limits if limit), UNKNOWN_LIMIT)
        begins = [tokenizer.bos_token_id, tokenizer.eos_token_id]
        self.begin: Ids = [next(token for token in begins if token is not None)]

    def encode(self, texts: list[str]) -> list[Ids]:
        """Ids with the token that begins a document before; of a model that has none, the one that ends one."""
        found = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [self.begin + list(ids) for ids in found]

    def score(self, examples: Iterable[Example]) -> Iterator[list[Score]]:
        """The scores of each example's sequences, in order."""
        for example in examples:
            yield self._scores(example)

    @torch.no_grad()
    def _scores(self, example: Example) -> list[Score]:
        inputs = [ids[:-1] for ids in example.ids]  # nothing comes after the last token
        head = shared(inputs)
        if head == 0:  # cropped ones begin anywhere
            return [self._alone(ids, span) for ids, span in zip(example.ids, example.spans)]
        first = min(start - 1 for start, _ in example.spans)
        kept = min(first, head - 1)  # from here on, logits of what is shared are wanted
        device = self.model.device
        tails = [one[head:] for one in inputs]
        longest = max(map(len, tails))
        cache, past = self._cache() if longest else (None, {})
        row = torch.tensor([inputs[0][:head]], device=device)
        logits = self.model(row, logits_to_keep=head - kept, **past).logits.float()[:, kept - head :]
        after: list[Tensor] = [logits[0, :0]] * len(inputs)
        if cache is not None:
            cache.batch_repeat_interleave(len(inputs))
            padded = torch.tensor([tail + [0] * (longest - len(tail)) for tail in tails], device=device)
            after = list(self.model(padded, **past).logits.float())  # each (longest, V)
        found = []
        for (start, end), ids, tail in zip(example.spans, example.ids, after):
            rows = torch.cat((logits[0], tail))[start - 1 - kept : end - 1 - kept]
            found.append(_score(rows, ids[start:end]))
        return found

    def _cache(self) -> tuple[Any, dict[str, Any]]:
        """A cache, and the argument that gives it to the model: its name changes from version 5.40 on."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        name = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"
        return cache, {name: cache, "use_cache": True}

    def _alone(self, ids: Ids, span: tuple[int, int]) -> Score:
        start, end = span
        row = torch.tensor([ids[:-1]], device=self.model.device)
        logits = self.model(row, logits_to_keep=len(ids) - start).logits[0].float()  # of the last positions
        return _score(logits[start - len(ids) :][: end - start], ids[start:end])


def _score(logits: Tensor, ids: Ids) -> Score:
    """logits (tokens, V) that predict these ids."""
    wanted = torch.tensor(ids, device=logits.device, dtype=torch.int64)
    losses = F.cross_entropy(logits, wanted, reduction="none")
    return Score(losses.tolist(), bool((logits.argmax(-1) == wanted).all()))
