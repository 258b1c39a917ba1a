"""Checkpoints: a folder per step, complete or not there.

    RUN/base/step_000300/{model,optimizer,loader}.safetensors, meta.json, manifest.json

Everything is written into a temporary folder and flushed; the manifest, with the SHA-256 of every file, comes last;
then the folder is renamed. A folder without a manifest, or with a file that does not match it, is passed over aloud,
and the newest complete one is used. Nothing is pickled. A stage is finished when its last checkpoint says so
("finished": true).
"""

import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat.errors import UserError
from nanochat.files import sha256, sync_folder, write_atomically
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer

MANIFEST = "manifest.json"
KEEP = 2  # checkpoints of a stage that are kept


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
        return json.loads((self.folder / MANIFEST).read_text())["model.safetensors"][:16]

    def tensors(self, part: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """part: "model", "optimizer" or "loader"."""
        return load_file(self.folder / f"{part}.safetensors", device=str(device))

    def model(self, device: torch.device | str, dtype: torch.dtype) -> GPT:
        """The model with its weights, activations in `dtype`."""
        with torch.device("meta"):
            model = GPT(self.config)
        model.to_empty(device=device)
        model.load_state_dict(self.tensors("model", device))
        model.set_dtype(dtype)
        return model

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises UserError when the model was trained with another tokenizer."""
        if self.meta["tokenizer"] != tokenizer.fingerprint:
            raise UserError(
                f"{self.folder} was trained with another tokenizer ({self.meta['tokenizer']}) than the run's "
                f"({tokenizer.fingerprint}); train the stage again with --fresh, or put its tokenizer back"
            )


def save(
    folder: Path,
    meta: dict[str, Any],
    model: GPT,
    parts: dict[str, dict[str, Tensor]],
) -> Checkpoint:
    """Writes folder/step_…, then removes all but the newest KEEP. meta must have "step" and "finished".

    A failure (a full disk, say) leaves no trace and the older checkpoints as they were.
    """
    name = f"step_{meta['step']:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = folder / f".tmp-{name}-{os.getpid()}"
    temporary.mkdir()
    try:
        meta = dict(meta, config=asdict(model.config))
        for part, tensors in dict(parts, model=dict(model.state_dict())).items():
            path = temporary / f"{part}.safetensors"
            _save_tensors(path, tensors)
        write_atomically(temporary / "meta.json", json.dumps(meta, indent=1).encode())
        digests = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
        write_atomically(temporary / MANIFEST, json.dumps(digests, indent=1).encode())
        final = folder / name
        if final.exists():  # an older attempt at the same step that did not verify
            shutil.rmtree(final)
        os.rename(temporary, final)
        sync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in sorted(folder.glob("step_*"))[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return Checkpoint(final, meta)


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # its I/O errors carry no errno
        text = str(error)
        if "os error 28" in text or "No space" in text:
            raise OSError(28, "No space left on device", str(path)) from None
        raise
    with open(path, "rb") as f:
        os.fsync(f.fileno())


def latest(folder: Path, verify: bool = True) -> Checkpoint | None:
    """The newest complete checkpoint in a folder, or None. Damaged ones are named on stderr and passed over."""
    for path in sorted(folder.glob("step_*"), reverse=True):
        problem = damage(path) if verify else None
        if problem is None:
            return Checkpoint(path, json.loads((path / "meta.json").read_text()))
        print(f"warning: {path} is not used: {problem}", file=sys.stderr)
    return None


def at(path: Path) -> Checkpoint:
    """The checkpoint in a folder. Raises UserError when it is damaged."""
    problem = damage(path)
    if problem is not None:
        raise UserError(f"{path} cannot be used: {problem}")
    return Checkpoint(path, json.loads((path / "meta.json").read_text()))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        digests = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        return "it has no manifest, so it was not written to the end"
    except ValueError:
        return "its manifest is damaged"
    for name, digest in digests.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if sha256(path / name) != digest:
            return f"{name} does not match its checksum"
    return None


def finished(folder: Path) -> bool:
    """Whether the newest checkpoint in a folder says that its stage is finished (checksums aside)."""
    checkpoint = latest(folder, verify=False) if folder.is_dir() else None
    return checkpoint is not None and checkpoint.finished
