"""Command-line flags from one dataclass per script, and the frame that every script runs in.

A field made by `flag(default, help)` becomes `--field-name`; its type comes from the default (or from `kind` where the
default is None). `run_script` turns a UserError into one sentence and exit code 2, and what the operating system
refuses likewise: a full disk, a file that may not be read.
"""

import argparse
import dataclasses
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from nanochat import oserrors
from nanochat.errors import EXIT_INTERRUPTED, EXIT_USAGE, UserError

T = TypeVar("T")


def flag(default: Any, help: str, *aliases: str, kind: type | None = None, choices: tuple | None = None) -> Any:
    """A dataclass field that is a command-line flag. Booleans become `--name` / `--no-name`."""
    kind = kind or type(default)
    return dataclasses.field(default=default, metadata=dict(help=help, aliases=aliases, kind=kind, choices=choices))


def parse(cls: type[T], description: str, argv: list[str] | None = None, defaults: T | None = None) -> T:
    """The dataclass filled from the command line. Unknown or malformed flags end the process with code 2.

    `defaults`: an instance whose values stand in for the fields' own defaults.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        meta = field.metadata
        names = [f"--{field.name.replace('_', '-')}", *meta["aliases"]]
        options: dict[str, Any] = dict(
            dest=field.name, default=getattr(defaults, field.name, field.default), help=meta["help"]
        )
        if meta["kind"] is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options.update(type=meta["kind"], choices=meta["choices"])
        parser.add_argument(*names, **options)
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["--"]:  # torchrun wants it between its own flags and ours, and may hand it on
        words = words[1:]
    return cls(**vars(parser.parse_args(words)))


def run_script(main: Callable[[], None]) -> NoReturn:
    """Runs a script's main and exits: 0 done, 2 wrong use, 75 interrupted and resumable. Ranks part before that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _printable()
    try:
        _first(main)
    except UserError as error:
        sys.exit(fail(str(error)))
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            same = "The same command without --fresh" if "--fresh" in sys.argv else "The same command again"
            print(f"\nStopped. {same} goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except OSError as error:
        if not (said := oserrors.sentence(error)):
            raise
        sys.exit(fail(said))
    finally:
        if "torch" in sys.modules:
            from nanochat.ranks import leave

            leave()
    sys.exit(0)


def _printable() -> None:
    """So that no print ends a training: of a sample that the terminal has no letters for, or where whoever started us
    has closed a stream. Its number is taken, or a checkpoint would get it, and what libraries print.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _first(main: Callable[[], None]) -> None:
    """Runs main; of several ranks that fail, only the first says why."""
    try:
        main()
    except Exception as error:
        if "torch" in sys.modules:
            from nanochat.consensus import tell_first

            tell_first(error)
        raise


def fail(message: str) -> int:
    """Prints one sentence to stderr; returns exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    return EXIT_USAGE
