"""Checkpoints: a folder per step, complete or not there.

    RUN/base/step_000300/{model,optimizer,loader}.safetensors, meta.json, manifest.json

Everything is written into a temporary folder and flushed; the manifest, with the SHA-256 of every file, comes last and
makes it complete; then the folder is renamed. A checkpoint of the same step is first moved aside and removed when the
new one is in its place, so that a process killed at any moment leaves a complete one, if need be under a temporary
name, where it is found. A damaged one is passed over aloud, and the newest complete one is used. Nothing is pickled. A
stage is finished when its last checkpoint says so ("finished": true). nanochat/complete.py decides what is complete;
nanochat/saving.py writes in a thread.
"""

import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nanochat import complete, fresh
from nanochat.complete import FOLDER, MANIFEST, Damaged
from nanochat.errors import UserError
from nanochat.files import sync_folder, write_atomically
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import Moment
from nanochat.tokenizer import Tokenizer

KEEP = 2  # complete checkpoints of a stage that are kept
STATES = (".old-", "", ".tmp-")  # from older to newer


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk; its parts are read when asked for."""

    folder: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        return self.meta["step"]

    @property
    def finished(self) -> bool:
        return self.meta["finished"]

    @property
    def config(self) -> GPTConfig:
        return GPTConfig(**self.meta["config"])

    @property
    def fingerprint(self) -> str:
        """Of the weights, from the manifest: stages that go on from here carry it."""
        try:
            return complete.manifest(self.folder)["model.safetensors"][:16]
        except Damaged as problem:
            raise UserError(f"{self.folder} cannot be used any more: {problem}") from None

    def tensors(self, part: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """part: "model", "optimizer", "loader" or "fp8". Raises UserError when the file has gone bad meanwhile."""
        path = self.folder / f"{part}.safetensors"
        try:
            open(path, "rb").close()  # says why it cannot be; safetensors only knows "no such file"
            return load_file(path, device=str(device))
        except (SafetensorError, OSError, RuntimeError) as problem:  # the last is torch's, of a file it cannot open
            why = str(problem).partition("\n")[0]
            raise UserError(f"{path} cannot be read ({why}); the same command again looks for another") from None

    def model(self, device: torch.device | str, dtype: torch.dtype, weights: torch.dtype = torch.float32) -> GPT:
        """The model, activations in `dtype`. weights: what it is to have them in; they are there in no other."""
        with torch.device("meta"):
            model = GPT(self.config).to(weights)
        wanted = self.weights(model)  # on the host: a GPU need not hold them twice
        model.to_empty(device=device)
        model.load_state_dict(wanted)
        model.set_dtype(dtype)
        return model

    def weights(self, model: GPT) -> dict[str, Tensor]:
        """The tensors for this model. Raises UserError where they are another one's."""
        found, wanted = self.tensors("model"), model.state_dict()
        with same_version(self.folder):
            if names := sorted(set(found) ^ set(wanted)):
                raise ValueError(f"{names[0]} is {'too many' if names[0] in found else 'missing'}")
            for name, tensor in found.items():
                if tensor.shape != wanted[name].shape or tensor.is_floating_point() != wanted[name].is_floating_point():
                    kinds = (f"{one.dtype} {tuple(one.shape)}" for one in (tensor, wanted[name]))
                    raise ValueError(f"{name} is {' and not '.join(kinds)}")
        return found

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises UserError when the model was trained with another tokenizer."""
        if self.meta["tokenizer"] != tokenizer.fingerprint:
            raise UserError(
                f"{self.folder} was trained with another tokenizer ({self.meta['tokenizer']}) than the run's "
                f"({tokenizer.fingerprint}); train the stage again with --fresh, or put its tokenizer back"
            )


DEVICE = re.compile(r"memory|\b(CUDA|HIP|MPS|NCCL)\b")  # what a card complains of is no file's fault


@contextmanager
def same_version(folder: Path) -> Iterator[None]:
    """Raises UserError where what a whole checkpoint holds is not as this code writes it, naming its stage's folder."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as problem:
        if isinstance(problem, RuntimeError) and DEVICE.search(str(problem)):
            raise
        why = f"it has no {problem}" if isinstance(problem, KeyError) else str(problem).partition("\n")[0]
        raise UserError(
            f"{folder} was saved by another version of this code ({why}); go on with that version, or train "
            f"{folder.parent.name} again with --fresh"
        ) from problem


def save(
    folder: Path,
    meta: dict[str, Any],
    model: GPT,
    parts: dict[str, dict[str, Tensor]],
) -> Checkpoint:
    """`write` with the model's config and weights added."""
    return write(folder, dict(meta, config=asdict(model.config)), dict(parts, model=dict(model.state_dict())))


def write(folder: Path, meta: dict[str, Any], parts: Mapping[str, Mapping[str, Tensor | Moment]]) -> Checkpoint:
    """Writes folder/step_…, then removes all but the newest KEEP. meta must have "step", "finished" and "config".

    Moments of several ranks are gathered one by one as they are written, in the order of `in_order`.

    A failure (a full disk, say) leaves no trace and the older checkpoints as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settle(folder)
    final = folder / f"step_{meta['step']:06d}"
    temporary = folder / f".tmp-{final.name}-{os.getpid()}"
    temporary.mkdir()
    try:
        digests = {}
        for part, tensors in parts.items():
            name = f"{part}.safetensors"
            digests[name] = write_tensors(temporary / name, tensors)
        meta = dict(meta, parts=sorted(parts))
        text = json.dumps(meta, indent=1).encode()
        write_atomically(temporary / "meta.json", text)
        digests["meta.json"] = hashlib.sha256(text).hexdigest()
        write_atomically(temporary / MANIFEST, json.dumps(digests, indent=1).encode())
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _put(temporary, final)
    kept = 0
    for path in reversed(steps(folder).values()):
        if kept >= KEEP and path != final:
            _remove(path)
        else:
            kept += damage(path, verify=False) is None
    for replaced in (folder, folder.parent):  # a stage, a run
        fresh.forget(replaced)
    return Checkpoint(final, meta)


def _put(temporary: Path, final: Path) -> None:
    """Gives a complete checkpoint its place; one that has it is removed only when the new one is there for good."""
    aside = final.with_name(f".old-{final.name}-{os.getpid()}")
    replacing = final.exists()
    if replacing:
        os.rename(final, aside)
    os.rename(temporary, final)
    sync_folder(final.parent)
    if replacing:
        _remove(aside)


def settle(folder: Path) -> None:
    """Ends what a killed save left behind: what is complete and newest takes its place, the rest is removed.

    Only for the process that writes there. What cannot be read now, and may be whole, stays as it is.
    """
    for step, state, path in _folders(folder):
        if not state:
            continue
        final = folder / f"step_{step:06d}"
        try:
            wanted = damage(path, unreadable=False) is None
            if wanted and state == ".old-":
                wanted = damage(final, unreadable=False) is not None
                if wanted:
                    _remove(final)
        except Damaged:
            continue
        if wanted:
            _put(path, final)
        else:
            sync_folder(folder)  # what replaced it is there for good before it goes
            _remove(path)


def _remove(path: Path) -> None:
    """A folder, or what stands in its place; what cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _folders(folder: Path) -> list[tuple[int, str, Path]]:
    """(step, state, path) of every folder that is ours, from the oldest to the newest. Raises OSError."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    matches = [(FOLDER.fullmatch(name), folder / name) for name in names]
    found = [(int(match[1] or match[3]), match[2] or "", path) for match, path in matches if match]
    return sorted(found, key=lambda entry: (entry[0], STATES.index(entry[1]), entry[2]))


def steps(folder: Path) -> dict[int, Path]:
    """The checkpoints of a stage that have their place, complete or not, by step: from the oldest to the newest."""
    return {step: path for step, state, path in _folders(folder) if not state}


CHUNK = 1 << 24  # bytes that are hashed and written at a time; Python's lock is free meanwhile
NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}  # of dtypes in a safetensors file


def in_order(tensors: Mapping[str, Tensor | Moment]) -> list[str]:
    """The names as they follow in a file: wide dtypes first."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def write_tensors(path: Path, tensors: Mapping[str, Tensor | Moment], metadata: dict[str, str] | None = None) -> str:
    """Writes a safetensors file, flushed to disk; returns its SHA-256, taken on the way, as `files.sha256` gives it.

    The library's own writer keeps the digest from us, and `safetensors.serialize` would hold everything in memory a
    second time. The format: 8 bytes with the length of the header, little-endian; the header, JSON; the tensors' bytes
    one after another, those of wide dtypes first, so that each is aligned. Tensors may be on any device: one at a time
    is copied. metadata: words for other readers. Raises OSError with the path.
    """
    order = in_order(tensors)
    header: dict[str, Any] = dict(__metadata__=metadata) if metadata else {}
    end = 0
    for name in order:
        tensor, begin = tensors[name], end
        end += math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = dict(dtype=NAMES[tensor.dtype], shape=list(tensor.shape), data_offsets=[begin, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    try:
        with open(path, "wb") as f:
            head = memoryview(len(text).to_bytes(8, "little") + text)
            for block in chain([head], (_bytes(tensors[name]) for name in order)):
                for at in range(0, len(block), CHUNK):
                    digest.update(block[at : at + CHUNK])
                    f.write(block[at : at + CHUNK])
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    return digest.hexdigest()


def _bytes(tensor: Tensor | Moment) -> memoryview:
    tensor = tensor.whole() if isinstance(tensor, Moment) else tensor
    whole = tensor.detach().cpu().contiguous()
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8).numpy().data  # a stride of 0 can be contiguous


def newest(folder: Path, verify: bool = True) -> tuple[Checkpoint | None, list[str]]:
    """(the newest complete checkpoint in a folder, a sentence about each newer one that is damaged).

    One that a killed process could not give its place any more counts too.
    """
    damaged: list[str] = []
    for _, state, path in reversed(_folders(folder)):
        if state and not (path / MANIFEST).exists():
            continue  # somebody still writes it, or was killed while writing
        try:
            return Checkpoint(path, complete.read(path, verify)), damaged
        except Damaged as problem:
            damaged.append(f"{path} is not used: {problem}")
    return None, damaged


def latest(folder: Path, verify: bool = True) -> Checkpoint | None:
    """The newest complete checkpoint in a folder, or None. Damaged ones are named on stderr and passed over."""
    found, damaged = newest(folder, verify)
    warn(damaged)
    return found


def warn(sentences: list[str]) -> None:
    """On stderr, once for all ranks."""
    for sentence in sentences if os.environ.get("RANK", "0") == "0" else ():
        print(f"warning: {sentence}", file=sys.stderr)


def to_resume(folder: Path) -> Checkpoint | None:
    """`latest`, or None where nothing was saved. Raises UserError when there are checkpoints, and none is complete."""
    found, damaged = newest(folder)
    if found is None and damaged:
        raise UserError(
            f"no checkpoint in {folder} can be used ({damaged[0]}); put a copy in its place, or give --fresh to train "
            "the stage again"
        )
    warn(damaged)
    return found


def at(path: Path) -> Checkpoint:
    """The checkpoint in a folder. Raises UserError when it is damaged."""
    try:
        return Checkpoint(path, complete.read(path))
    except Damaged as problem:
        raise UserError(f"{path} cannot be used: {problem}") from None


def damage(path: Path, verify: bool = True, unreadable: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None. unreadable=False: raises Damaged for one that cannot be read now."""
    try:
        complete.read(path, verify)
    except Damaged as problem:
        if problem.unreadable and not unreadable:
            raise
        return str(problem)
    return None


def finished(folder: Path) -> bool:
    """Whether the newest complete checkpoint in a folder says that its stage is finished."""
    found, _ = newest(folder)
    return found is not None and found.finished
