"""The real data sets of nanochat on the Hugging Face Hub, or in a local mirror of it.

Pretraining reads parquet shards of karpathy/climbmix-400b-shuffle; the chat stages read SmolTalk, MMLU, GSM8K and ARC
through `datasets`. With NANOCHAT_HUB_ROOT set to a folder laid out as OWNER/NAME/…, nothing is asked of the network.
Shards are fetched by huggingface_hub: whole or not there, resumed where they broke off. Whatever the network refuses
is tried again with growing pauses.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from nanochat import optional
from nanochat.data.documents import Documents
from nanochat.errors import UserError
from nanochat.progress import Count

BASE_REPO = "karpathy/climbmix-400b-shuffle"
LAST_SHARD = 6542  # the shard that validates, by name; the others are for training
SHARD_CHARACTERS = 250_000_000
TRIES = 5
T = TypeVar("T")


class Lacks(UserError):
    """A mirror, or the Hub, is there and has not got a data set: asking again would not help."""


def shard_name(number: int) -> str:
    return f"shard_{number:05d}.parquet"


def mirror() -> Path | None:
    """The local mirror, or None. Raises UserError when NANOCHAT_HUB_ROOT names no folder."""
    root = os.environ.get("NANOCHAT_HUB_ROOT")
    if not root:
        return None
    if not Path(root).is_dir():
        raise UserError(f"NANOCHAT_HUB_ROOT is {root}, which is no folder; unset it, or lay a mirror out there")
    return Path(root).resolve()


def reachable() -> tuple[bool, str]:
    """Whether hub data can be had here, and how or why not."""
    if mirror():
        return True, f"a local mirror at {mirror()}"
    try:
        from huggingface_hub import HfApi, constants
    except ImportError:
        return False, "huggingface_hub is not installed"
    if constants.HF_HUB_OFFLINE:
        return False, "HF_HUB_OFFLINE is set"
    try:
        patiently(lambda: HfApi().dataset_info(BASE_REPO, timeout=5), tries=3)  # a plan is kept
    except Exception as error:  # any failure means the same here: no hub
        return False, f"the Hub does not answer ({type(error).__name__})"
    return True, "the Hub answers"


def base_documents(shards: int) -> Documents:
    """Pretraining text: `shards` training shards (of a mirror: all it has) and the validation shard."""
    root = mirror()
    if root is None:
        paths = fetch_shards(numbers(shards))
        return Documents(Path(BASE_REPO), val=paths[-1:], train=paths[:-1])
    folder = root / BASE_REPO
    paths = sorted(folder.glob("shard_*.parquet"))
    if len(paths) < 2:
        raise UserError(
            f"the mirror has {len(paths)} shards of {BASE_REPO} in {folder}; "
            "wanted at least two: the last one validates"
        )
    return Documents(Path(BASE_REPO), val=paths[-1:], train=paths[:-1])


def numbers(shards: int) -> list[int]:
    """Of so many training shards, and of the one that validates."""
    return [*range(min(shards, LAST_SHARD)), LAST_SHARD]


def shards_for(tokens: int) -> int:
    """Training shards that hold this many tokens, with a tenth to spare for cropping, at 4.5 characters a token."""
    return min(LAST_SHARD, -(-int(tokens * 4.5 * 1.1) // SHARD_CHARACTERS) + 1)


def fetch_shards(numbers: Sequence[int]) -> list[Path]:
    """Paths of these shards, downloading what is not there yet, four at a time. Raises UserError when it cannot.

    By threads that no one waits for: where one fails, or the user interrupts, nothing outlives the process.
    """
    try:
        import huggingface_hub  # noqa: F401 (its threads import it again)
    except ImportError as missing:
        raise UserError(
            f"fetching needs huggingface_hub ({missing}): pip install huggingface_hub; or use --data embedded"
        ) from None

    wanted = dict.fromkeys(map(shard_name, numbers))
    waiting = [*wanted][::-1]
    came: SimpleQueue[tuple[str, Path | Exception]] = SimpleQueue()

    def work() -> None:
        while True:
            try:
                name = waiting.pop()
            except IndexError:
                return
            try:
                came.put((name, _fetch(name)))
            except Exception as problem:
                came.put((name, problem))

    for _ in range(4):
        threading.Thread(target=work, daemon=True, name="fetch").start()
    paths: dict[str, Path] = {}
    try:
        with Count(f"{BASE_REPO}: shards", len(wanted), os.environ.get("RANK", "0") == "0") as count:
            while len(paths) < len(wanted):
                name, path = came.get()
                if isinstance(path, Exception):
                    raise path
                paths[name] = path
                count.tick(1)
    finally:
        waiting.clear()
    return [paths[shard_name(number)] for number in numbers]


def _fetch(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    def download() -> Path:
        try:
            return Path(hf_hub_download(BASE_REPO, name, repo_type="dataset"))
        except (RepositoryNotFoundError, EntryNotFoundError) as error:
            if isinstance(error, LocalEntryNotFoundError):
                raise
            raise Lacks(f"{BASE_REPO} on the Hub has no {name} ({type(error).__name__})") from None

    try:
        return patiently(download)
    except UserError:
        raise
    except Exception as problem:
        raise UserError(
            f"{name} of {BASE_REPO} could not be downloaded ({type(problem).__name__}); connect to the Hub and call "
            "again (it goes on where it stopped), point NANOCHAT_HUB_ROOT at a mirror, or use --data PATH or --data "
            "embedded"
        ) from None


def patiently(load: Callable[[], T], tries: int = TRIES) -> T:
    """What `load` returns; where it fails it is tried again, with growing pauses, but for a UserError or offline."""
    from huggingface_hub import constants

    for attempt in range(0 if constants.HF_HUB_OFFLINE else tries - 1):
        try:
            return load()
        except UserError:
            raise
        except Exception:  # the network in all its forms
            time.sleep(2**attempt)
    return load()


def to_download(shards: int) -> int:
    """How many of the shards of `base_documents` are not in the Hub's cache yet."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return shards + 1
    there = lambda name: isinstance(try_to_load_from_cache(BASE_REPO, name, repo_type="dataset"), str)
    return sum(not there(shard_name(number)) for number in numbers(shards))


def cache() -> Path:
    """The folder of the Hub's cache."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return Path(os.path.expanduser("~"))  # which needs no home
    return Path(constants.HF_HUB_CACHE)


Split = tuple[str, str | None, str]  # of a data set: its repository, subset (None: it has none) and split


def _files(root: Path, repo: str, subset: str | None, split: str) -> list[str]:
    """A split's files in a mirror."""
    return sorted(str(file) for file in (root / repo / (subset or "data")).glob(f"{split}-*.parquet"))


def has(repo: str, subset: str | None, split: str) -> bool:
    """Whether a mirror has a split of a data set; without one, the Hub is taken to have it."""
    root = mirror()
    return root is None or bool(_files(root, repo, subset, split))


def dataset(repo: str, subset: str | None, split: str) -> Any:
    """One split of a data set, as `datasets` gives it.

    Raises Lacks where a mirror or the Hub has not got it, another UserError where it cannot be had.
    """
    try:
        datasets = optional.package("datasets", "load_dataset")
    except ImportError as missing:
        raise UserError(f"{repo} is read with the package datasets ({missing}): pip install datasets") from None
    datasets.disable_progress_bars()
    root = mirror()
    try:
        if root is None:
            return patiently(lambda: _load(datasets, repo, subset, split))
        files = _files(root, repo, subset, split)
        if not files:
            raise Lacks(f"the mirror has no {split}-*.parquet of {repo} in {root / repo / (subset or 'data')}")
        return datasets.load_dataset("parquet", data_files=files, split="train")
    except UserError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")[:100]
        raise UserError(
            f"{repo} ({subset or 'default'}, {split}) could not be loaded ({why}); connect to the Hub, or point "
            "NANOCHAT_HUB_ROOT at a mirror"
        ) from None


def _load(datasets: Any, repo: str, subset: str | None, split: str) -> Any:
    """A split from the Hub. Raises Lacks where that has no such data set."""
    try:
        return datasets.load_dataset(repo, subset, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:  # a mere FileNotFoundError may be the network's
        raise Lacks(f"the Hub has no {repo} ({type(error).__name__})") from None
