"""The chat stages' mixtures from the hub's data sets: SmolTalk, MMLU, GSM8K, ARC, and who the model is.

Each data set is a sequence of conversations. One that cannot be had is left out aloud; without SmolTalk there is no
stage.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nanochat.data import hub
from nanochat.data.conversations import Mixture
from nanochat.data.microworld.conversations import GREETINGS, IDENTITY, choice_prompt
from nanochat.errors import UserError


@dataclass(frozen=True)
class Rendered(Sequence[dict]):
    """Rows of a data set as conversations."""

    rows: Any
    render: Callable[[dict], dict]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):  # type: ignore[no-untyped-def, override]
        return self.render(self.rows[index])


def smoltalk(split: str) -> Rendered:
    """General conversations, a smaller SmolTalk."""
    rows = hub.dataset("HuggingFaceTB/smol-smoltalk", None, split)
    return Rendered(
        rows, lambda row: dict(messages=[dict(role=m["role"], content=m["content"]) for m in row["messages"]])
    )


def gsm8k(split: str) -> Rendered:
    """Grade-school mathematics; the «expression=result» marks become calls of the python tool."""
    return Rendered(hub.dataset("openai/gsm8k", "main", split), gsm8k_conversation)


def gsm8k_conversation(row: dict) -> dict:
    parts = []
    for piece in re.split(r"(<<[^>]*>>)", row["answer"]):
        if piece.startswith("<<"):
            expression, _, result = piece[2:-2].rpartition("=")
            parts += [dict(type="python", text=expression), dict(type="python_output", text=result)]
        elif piece:
            parts.append(dict(type="text", text=piece))
    return _exchange(row["question"], parts)


def mmlu(split: str) -> Rendered:
    """Multiple choice over 57 subjects; split auxiliary_train, validation or test."""
    rows = hub.dataset("cais/mmlu", "all", split)
    return Rendered(rows, lambda row: _exchange(choice_prompt(row["question"], row["choices"]), "ABCD"[row["answer"]]))


def arc(subset: str, split: str) -> Rendered:
    """Grade-school science, multiple choice; subset ARC-Easy or ARC-Challenge."""

    def conversation(row: dict) -> dict:
        choices = row["choices"]
        return _exchange(choice_prompt(row["question"], choices["text"], choices["label"]), row["answerKey"])

    return Rendered(hub.dataset("allenai/ai2_arc", subset, split), conversation)


def _exchange(question: str, answer: Any) -> dict:
    return dict(messages=[dict(role="user", content=question), dict(role="assistant", content=answer)])


def identity() -> list[dict]:
    """Greetings, and who the model is."""
    return [_exchange(asked, answer) for asked, answer in {**GREETINGS, **IDENTITY}.items()]


def mixture(stage: str) -> tuple[Mixture, list[str]]:
    """(the source for stage "mid" or "sft", one sentence for each data set that is left out).

    mid: SmolTalk, MMLU, GSM8K, ARC once; sft: SmolTalk once, MMLU three times, GSM8K four times. Raises UserError
    without SmolTalk.
    """
    epochs = dict(mmlu=3, gsm8k=4) if stage == "sft" else {}
    optional: dict[str, Callable[[], Sequence]] = {
        "mmlu": lambda: mmlu("auxiliary_train"),
        "gsm8k": lambda: gsm8k("train"),
    }
    if stage == "mid":
        optional["arc-easy"] = lambda: arc("ARC-Easy", "train")
        optional["arc-challenge"] = lambda: arc("ARC-Challenge", "train")
    train: dict[str, tuple[Sequence, int]] = {"smoltalk": (smoltalk("train"), 1), "identity": (identity(), 60)}
    left_out = []
    for name, load in optional.items():
        try:
            train[name] = (load(), epochs.get(name, 1))
        except UserError as error:
            left_out.append(f"{name} is left out: {error}")
    return Mixture(f"hub ({stage}: {', '.join(train)})", train, {"smoltalk": (smoltalk("test"), 1)}), left_out
