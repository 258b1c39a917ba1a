"""What ranks agree on: what rank 0 has found, and whose error is reported when they fail.

Ranks may be on several machines, which see a shared folder change at different times; and when one fails, the
collectives of all others break.
"""

from __future__ import annotations

import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from nanochat import oserrors
from nanochat.errors import EXIT_AFTER, UserError, is_number
from nanochat.world import PATIENCE

if TYPE_CHECKING:
    from nanochat.checkpoint import Checkpoint

T = TypeVar("T")
Found = TypeVar("Found", bound="Checkpoint | None")
TO_APPEAR = 120.0  # seconds until another machine sees what one has written into a shared folder
TO_HEAR = 5.0  # seconds that the first of several machines stays to tell the others that it failed
FAILED = "failed first"  # key in the store of the process group; a text that nobody plans


def from_rank_0(make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank; it is sent pickled, so it holds no tensors. Collective."""
    if not _others():
        return make()
    found: list[Any] = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def from_first_machine(make: Callable[[], str], nodes: int, node: int, head: str) -> str:
    """The text that the first of several machines makes, on all of them. head: its address:port, which it listens on.

    Raises UserError on the others when it fails, and where machines do not come.
    """
    if nodes == 1:
        return make()
    host, _, port = head.rpartition(":")
    if not (host and is_number(port) and int(port) < 1 << 16):
        raise UserError(f"--head is {head!r}, wanted the first machine's address:port, since --nodes is {nodes}")
    try:
        store = dist.TCPStore(host, int(port), is_master=node == 0, timeout=PATIENCE, wait_for_workers=False)
        if node > 0:
            text = os.fsdecode(store.get("text"))
            store.add("taken", 1)
    except RuntimeError as problem:
        why = str(problem).splitlines()[0]
        raise UserError(f"machine {node} has no plan from the first one, {head}: {why}") from None
    if node > 0:
        if text == FAILED:
            raise UserError("the first machine could not plan, and says why")
        return text
    try:
        text = make()
    except BaseException:
        store.set("text", FAILED)
        _taken(store, nodes - 1, TO_HEAR)
        raise
    store.set("text", os.fsencode(text))  # type: ignore[arg-type]  # its paths may be any bytes
    if (taken := _taken(store, nodes - 1, PATIENCE.total_seconds())) < nodes - 1:
        raise UserError(f"of {nodes} machines only {taken + 1} are there after {PATIENCE}")
    return text


def _taken(store: dist.Store, all: int, seconds: float) -> int:
    """How many machines have taken the text: all, or fewer after so many seconds."""
    waits_until = time.monotonic() + seconds
    while (taken := store.add("taken", 0)) < all and time.monotonic() < waits_until:
        time.sleep(0.1)
    return taken


def same_checkpoint(find: Callable[[], Found]) -> Found:
    """The checkpoint that rank 0 finds, on every rank: were each to look, they might find different ones. Collective.

    Another machine may see what rank 0 has written up to a minute later (NFS keeps folders in memory). Raises UserError
    on a rank that does not see it at all.
    """
    if not _others():
        return find()

    def look() -> tuple[Found, str]:
        one = find()
        return one, "" if one is None else one.fingerprint

    found, fingerprint = from_rank_0(look)
    waits_until = time.monotonic() + TO_APPEAR
    while found is not None and not _seen(found, fingerprint):
        if time.monotonic() > waits_until:
            raise UserError(
                f"rank {dist.get_rank()} on {platform.node()} does not see {found.folder} as rank 0 does: several "
                "machines need NANOCHAT_BASE_DIR in a folder that they share"
            )
        time.sleep(0.5)
    return found


def _seen(found: Checkpoint, fingerprint: str) -> bool:
    try:
        return found.fingerprint == fingerprint
    except (OSError, UserError):  # not all of it is there yet
        return False


def report_first(error: Exception) -> None:
    """Around what a script failed with, before it is reported: only the rank that fails first has its say.

    When a rank has failed, the collectives of all others break, each with a traceback of its own. So the first notes
    its words where all ranks can read them (the store of the process group), and the others end with one sentence and
    EXIT_AFTER, unless they would say the same. Returns where the error is to be raised on: on the first rank, for a
    sentence (UserError, what the system refuses), and without ranks. What would be a traceback is printed at once:
    parting takes time.
    """
    if not _others():
        return
    broken = isinstance(error, dist.DistError) or "gloo/transport" in str(error)
    words = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    if broken:
        words = f"a rank is gone, or cannot be reached: {error}"
    own = f"rank {dist.get_rank()}: {words}"
    try:
        first = dist.distributed_c10d._get_default_store().compare_set(FAILED, "", own).decode()
    except RuntimeError:  # gone with the process that kept it
        first = own
    if first == own:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)  # torchrun repeats them
        if isinstance(error, (UserError, OSError)) or oserrors.sentence(error):
            return
        print(f"error: {own}" if broken else traceback.format_exc(), file=sys.stderr, flush=True)
        sys.exit(1)
    if first.partition(": ")[2] != words:
        print(f"rank {dist.get_rank()} ends, because another has failed; {first.splitlines()[0]}", file=sys.stderr)
    sys.exit(EXIT_AFTER)


def _others() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
