"""Command-line flags from one dataclass per script, and the frame that every script runs in.

A field made by `flag(default, help)`, `path(default, help)` or `number(default, least, most, help)` becomes
`--field-name`. `run_script` turns a UserError into one sentence and exit code 2, and what the operating system refuses
likewise: a full disk, a file that may not be read, more memory than there is. What a terminal, a pipe or a locale may
do to the streams is in nanochat/streams.py.
"""

import argparse
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, NoReturn, TypeVar

from nanochat import oserrors, processes, streams
from nanochat.errors import EXIT_INTERRUPTED, EXIT_USAGE, UserError, one_line

T = TypeVar("T")
MANY = 10**15  # of whatever is counted: more are a mistake
SEEDS = (0, 2**32 - 1)
NO_LIMIT = 1 << 20  # a range that reaches so far is printed as "at least" its beginning
LESS = (
    "take less at a time (rows: --device-batch-size; answers: --batch-size or --slots; with speedrun.sh a smaller "
    "--depth), or see what else is on the GPU (nvidia-smi)"
)


def flag(default: Any, help: str, *aliases: str, kind: type | None = None, choices: tuple | None = None) -> Any:
    """A dataclass field that is a flag: a word or a switch. Booleans become `--name` / `--no-name`.

    kind: where the default is None. Only where the default is empty an empty word is accepted.
    """
    kind = kind or type(default)
    if kind not in (str, bool):
        raise TypeError(f"a flag of {kind} wants a range: number(default, least, most, help)")
    meta = dict(help=help, aliases=aliases, kind=kind, choices=choices, needed=default != "")
    return dataclasses.field(default=default, metadata=meta)


def path(default: str | None, help: str, kind: type = str) -> Any:
    """A flag that is or may be a path: `~/` may begin it, which a shell leaves as it is in `--name=~/x`."""
    made = flag(default, help, kind=kind)
    return dataclasses.field(default=default, metadata=dict(made.metadata, path=True))


def number(
    default: float | None,
    least: float,
    most: float,
    help: str,
    *aliases: str,
    also: float | None = None,
    multiple: int | None = None,
) -> Any:
    """A dataclass field that is a flag: a number from least to most, of their type; or the default, or `also`.

    multiple: of what it must be one.
    """
    allowed = tuple(value for value in (default, also) if value is not None and not least <= value <= most)
    meta = dict(help=help, aliases=aliases, kind=type(least), choices=None, range=(least, most), also=allowed)
    meta["multiple"] = multiple
    return dataclasses.field(default=default, metadata=meta)


def parse(cls: type[T], description: str, argv: list[str] | None = None, defaults: T | None = None) -> T:
    """The dataclass filled from the command line. Raises UserError for a flag that is not there, for a value that is
    none of its kind or outside its range, and for an empty word where one is needed.

    `defaults`: an instance whose values stand in for the fields' own defaults.
    """
    parser = _Parser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    there = []
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        meta = field.metadata
        help = "; ".join(part for part in (meta["help"], wanted(meta)) if part)
        names = [f"--{field.name.replace('_', '-')}", *meta["aliases"]]
        options: dict[str, Any] = dict(dest=field.name, default=getattr(defaults, field.name, field.default), help=help)
        if meta["kind"] is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options.update(type=meta["kind"], choices=meta["choices"])
        parser.add_argument(*names, **options)
        there += names
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["--"]:  # torchrun wants it between its own flags and ours, and may hand it on
        words = words[1:]
    known, others = parser.parse_known_args(words)
    if others:
        near = get_close_matches(others[0].partition("=")[0], there, 1)
        parser.error(f"{others[0]!r} is no flag" + (f", perhaps {near[0]} is meant" if near else ""))
    found = vars(known)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if found[field.name] == []:  # argparse's answer to --name=--
            parser.error(f"--{field.name.replace('_', '-')} is '--', which is no value")
        check(field.name, found[field.name], field.metadata)
        if field.metadata.get("path") and found[field.name]:
            found[field.name] = os.path.expanduser(found[field.name])
    return cls(**found)


class _Parser(argparse.ArgumentParser):
    """argparse, whose complaints are a sentence without the list of all flags."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[:300]}; --help lists the flags")


def wanted(meta: Any, value: float = 0) -> str:
    """A number's range in words, both ends where the value is beyond the second; "" for other flags."""
    least, most = meta.get("range", (None, None))
    if least is None:
        return ""
    if meta["multiple"]:
        return f"a multiple of {meta['multiple']}, {least:g} to {most:.10g}"
    return f"at least {least:g}" if value <= most and most >= NO_LIMIT else f"{least:g} to {most:.10g}"


def check(name: str, value: Any, meta: Any) -> None:
    """Raises UserError for a value that a flag cannot have. meta: of its field."""
    shown = f"--{name.replace('_', '-')}"
    if "range" in meta and value is not None and value not in meta["also"]:
        least, most = meta["range"]
        if not least <= value <= most or (meta["multiple"] and value % meta["multiple"]):  # NaN too
            raise UserError(f"{shown} is {value}, wanted {' or '.join([wanted(meta, value), *map(str, meta['also'])])}")
    if meta["kind"] is str and meta["choices"] is None and value is not None and meta["needed"] and not value.strip():
        raise UserError(f"{shown} is empty, wanted {meta['help']}")


def listed(name: str, words: str, known: Iterable[str]) -> list[str]:
    """The words of a comma-separated flag. Raises UserError for one that is not among those known."""
    for word in (found := words.split(",")):
        if word not in known:
            raise UserError(f"--{name} names {word!r}; there are {', '.join(known)}")
    return found


def run_script(main: Callable[[], None], goes_on: bool = False) -> NoReturn:
    """Runs a script's main and exits: 0 done, 2 wrong use, 75 interrupted and resumable. Ranks part before that.

    When whoever reads its output goes away (`| head`), a script ends quietly; goes_on: it does not, since its work is
    wanted without that: a training, a server.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    streams.prepare(goes_on)
    try:
        processes.end_with_launcher()
        _first(main)
    except UserError as error:
        sys.exit(fail(str(error)))
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            same = "The same command without --fresh" if "--fresh" in sys.argv else "The same command again"
            print(f"\nStopped. {same} goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except (OSError, MemoryError, RuntimeError) as error:
        if not (said := oserrors.sentence(error)):
            raise
        sys.exit(fail(said))
    finally:
        streams.finish()
        if "torch" in sys.modules:
            from nanochat.ranks import leave

            leave()
    sys.exit(0)


def _first(main: Callable[[], None]) -> None:
    """Runs main; of several ranks that fail, only the first says why. A full memory of a GPU is said in a sentence, and
    what NANOCHAT_KERNELS asks for in vain, or a GPU that a kernel has made useless."""
    try:
        main()
    except (Exception, getattr(sys.modules.get("kernels.dispatch"), "Lost", Exception)) as error:
        if isinstance(error, RuntimeError) and "out of memory" in str(error):  # torch's, whatever its class
            error = UserError(f"{'. '.join(str(error).splitlines()[0].split('. ')[:3])}; {LESS}")
        if "torch" in sys.modules:
            from kernels.dispatch import Lost, Refused
            from nanochat.consensus import report_first

            error = UserError(str(error)) if isinstance(error, (Lost, Refused)) else error
            report_first(error)
        raise error


def fail(message: str) -> int:
    """Prints one sentence to stderr; returns exit code 2."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    return EXIT_USAGE
