"""Runs a declared experiment (experiments/NAME/declaration.py), or goes on with it, and checks what its note claims.

Its table, plots and environment are beside the declaration. A table that is complete is only read: then this is the
check. Smoke runs are tiny, and their results are under $NANOCHAT_BASE_DIR/experiments.
"""

import sys
from dataclasses import dataclass

from nanochat.files import base_dir
from nanochat.flags import flag, number, parse, run_script
from nanochat.lab import declaration, runner


@dataclass
class Flags:
    smoke: bool = flag(False, "tiny shapes, a few cells: shows in seconds that all of it works")
    check: bool = flag(False, "run nothing: what does the table say as it is, and does the note agree?")
    max_minutes: float | None = number(None, 0.01, 1e7, "begin no cell after so many minutes")


def main() -> None:
    words = sys.argv[1:]
    if not words or words[0].startswith("-"):
        names = ", ".join(declaration.names())
        parse(Flags, f"{__doc__ or ''}\nExperiments: {names}. Usage: experiment NAME [flags]", words)
        print("\n".join(f"{name}: {declaration.load(name).question}" for name in declaration.names()))
        return
    name, flags = words[0], parse(Flags, __doc__ or "", words[1:])
    experiment = declaration.load(name)
    folder = base_dir() / "experiments" / name / "smoke" if flags.smoke else declaration.FOLDER / name
    print(f"question   {experiment.question}\nhypothesis {experiment.hypothesis}\nrefuted by {experiment.refuted_by}")
    if flags.check:
        findings = runner.conclude(name, experiment, folder)
    else:
        findings = runner.go(name, experiment, folder, flags.smoke, flags.max_minutes)
    print("\n".join(f"{claim}: {text}" for claim, text in findings.claims.items()))
    print(f"{folder}: {', '.join([runner.TABLE, *findings.plots])}")


if __name__ == "__main__":
    run_script(main, goes_on=True)
