"""JSON files that a run depends on: a missing one is missing, a damaged one is an error, and nothing in between.

Each carries a checksum of itself, since a flipped bit in a number is JSON all the same; one without it (an older
version's, or somebody's own) is checked for what its readers need. What to do about a damaged one is said with it.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, NoneType
from typing import Any

from nanochat import typed
from nanochat.errors import UserError, is_number
from nanochat.files import json_of, write_atomically
from nanochat.typed import Finite

CHECKSUM = "sha256"
OTHER = "is of another type"


@dataclass(frozen=True)
class Each:
    """Of an object all entries, or of a list, have this form."""

    form: Any
    of: type = dict


def _pair(value: Any) -> bool:
    return typed.fits(value, list[Finite]) and len(value) == 2


# Forms of what readers need: a type, as in typed.fits; what says whether a value is right; a dict of forms by key, of
# which those that end with "?" may be missing; Each of them; or several, of which one fits.
PLAN = {"parent?": str, **{f"{name}?": Finite for name in (
    "total_batch_size", "embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay", "warmdown_ratio",
)}}  # fmt: skip
KERNELS = {"rows?": Each(dict(group=str, on_ms=Finite, off_ms=Finite, on=bool), list), "when": str}
TRAINING = {
    "plan": PLAN, "data": str, "device": str, "world": int, "dtype": str, "compiled": bool,
    "parameters": dict(total=int), "steps": int, "tokens": int, "flops": Finite, "training_seconds": Finite,
    "tok_per_s": Finite, "train_loss": float, "val_bpb": float | None, "skipped_steps": int, "peak_memory": int,
    "val_tokens?": int | None, "kernels?": (NoneType, KERNELS), "samples?": list[str],
}  # fmt: skip
PRACTICE = dict.fromkeys(("questions", "num_samples"), int) | dict.fromkeys(("task", "reward"), str)  # of RL's plan
TOKENIZER = {
    "wanted": dict(data=str, fingerprint=str), "characters": int, "fingerprint": str, "vocab_size": int,
    "bytes_per_token?": {"validation?": dict[str, Finite]},
}  # fmt: skip
TEXT = dict(train_bpb=float, val_bpb=float)
RATE = dict(rate=Finite, low=Finite, high=Finite)
CORE_TASK = dict(accuracy=Finite, centered=Finite, baseline=Finite, n=int, low=Finite, high=Finite)
CORE = {
    "tasks": Each(CORE_TASK), "core": Finite, "partial": bool, "missing": list[str], "low?": Finite, "high?": Finite,
    "controls?": Each(dict[str, Finite]), "failed?": dict[str, str],
}  # fmt: skip
CHATCORE = dict(score=Finite, low=Finite, high=Finite, partial=bool, missing=list[str])
INT8 = dict(dtype=str, bpb=_pair, tasks=Each(_pair))
LETTERS = Each(dict(chosen=Finite, expected=Finite))
EXAMPLE = dict(outcome=str, question=str, answer=str, expected=str, python=list[str])
TASK = {
    **RATE, "wanted": lambda value: value in ("right", "refused"), "n": int,
    "counts": dict(right=int, wrong=int, refused=int), "examples": Each(Each(EXAMPLE, list)), "outcomes?": str,
    "pass?": lambda value: isinstance(value, dict) and all(map(is_number, value)) and not _wrong(value, Each(RATE)),
    "settings?": {"temperature?": Finite}, "letters?": LETTERS,
    "permuted?": {**RATE, "steady": Finite, "by_position": dict[str, Finite], "letters": LETTERS},
}  # fmt: skip

NOT_ASKED = dict(n=lambda value: value == 0)  # older versions kept tasks without a question, whose rates are NaN
# Keys of an evaluation's summary that hold results by stage, or by the name of a Hugging Face model.
OF_STAGES: dict[str, Any] = dict(chat=Each((TASK, NOT_ASKED)), core=CORE, core_hf=CORE, chatcore=CHATCORE, int8=INT8)


def digest(content: dict[str, Any]) -> str:
    """Of the values, however they are laid out in the file."""
    plain = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def write(path: Path, content: dict[str, Any]) -> None:
    """Replaces the file by `content` and its checksum, atomically."""
    write_atomically(path, json.dumps({**content, CHECKSUM: digest(content)}, indent=1).encode())


def read(path: Path, remedy: str) -> dict[str, Any] | None:
    """What `write` wrote; None where there is no file.

    Raises UserError with `remedy` for one that is damaged, OSError for one that cannot be read.
    """
    try:
        found = json_of(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, MemoryError):
        raise UserError(f"{path} is damaged: it is no JSON; {remedy}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object; {remedy}")
    written = found.pop(CHECKSUM, None)
    if written is not None and written != digest(found):
        raise UserError(f"{path} is damaged: it does not match its checksum; {remedy}")
    return found


def rows(path: Path, remedy: str) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; none where there is no file. Raises UserError for one that is damaged."""
    try:
        found = [json_of(line) for line in path.read_bytes().splitlines()]
    except FileNotFoundError:
        return []
    except (ValueError, MemoryError):
        raise UserError(f"{path} is damaged: a line of it is no JSON; {remedy}") from None
    if not all(isinstance(row, dict) for row in found):
        raise UserError(f"{path} is damaged: a line of it is no JSON object; {remedy}")
    return found


def lacks(stage: str, summary: dict[str, Any]) -> str:
    """What a summary of a stage ("tokenizer", "base", …, "eval") has not that its readers need; "" if nothing."""
    if summary.get("stage", stage) != stage:
        return f"it is of {summary['stage']!r}"
    if stage == "tokenizer":
        return _wrong(summary, TOKENIZER)
    if stage != "eval":
        return _wrong(summary, {**TRAINING, "plan": {**PLAN, **PRACTICE}} if stage == "rl" else TRAINING)
    for name, entry in summary.items():
        if name == "stage":
            continue
        if not isinstance(entry, dict):
            return f"{name} is no object"
        if name not in OF_STAGES:
            if why := _wrong(entry, TEXT):
                return f"{name}: {why}"
            continue
        for source, found in entry.items():
            why = _wrong(found, OF_STAGES[name]) if isinstance(found, dict) else "it is no object"
            if why:
                return f"{name}, {source}: {why}"
    return ""


def _wrong(found: Any, form: Any) -> str:
    """What is wrong with a value first, "" if it has the form: OTHER, or the same of a part of it."""
    if isinstance(form, Each):
        if not isinstance(found, dict | list) or type(found) is not form.of:
            return OTHER
        parts: Any = found.items() if isinstance(found, dict) else enumerate(found)
        return next((_of(name, why) for name, one in parts if (why := _wrong(one, form.form))), "")
    if isinstance(form, tuple):
        return min((_wrong(found, one) for one in form), key=lambda why: (why != "", why == OTHER))
    if isinstance(form, dict):
        if not isinstance(found, dict):
            return OTHER
        for name, inner in form.items():
            key = name.removesuffix("?")
            if key not in found and key == name:
                return f"{key} is missing"
            if key in found and (why := _wrong(found[key], inner)):
                return _of(key, why)
        return ""
    fits = form(found) if isinstance(form, FunctionType) else typed.fits(found, form)
    return "" if fits else OTHER


def _of(name: str | int, why: str) -> str:
    return f"{name} {why}" if why == OTHER else f"{name}: {why}"
