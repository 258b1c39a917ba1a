"""`python -m profiling COMMAND …`: the performance lab. `python -m profiling COMMAND --help` lists a command's flags.

trace FILE         the page about a trace that torch.profiler recorded; scripts record themselves with --profile N
diff A B           what got slower or faster between two profile.json
static             every kernel compiled for cards that are not here: machine code, bound, predicted time
compiled           the training step as compiled for a card that is not here: every launch, byte and allocation
ablate             which of our ops move fewer bytes in the compiled step, which decides where nothing was measured
fixes              the same for what is no op of ours: counts for the ledger
memory             what a compiled training step allocates on a card that is not here
counts             lowers the steps that simulate predicts from
simulate           a training step predicted, and what our ops save
points             the predictions beside published measurements
calibrate          on a GPU: measures it, and all predictions use that
ledger             writes profiling/LEDGER.md
"""

import argparse
import importlib
import sys

from nanochat.errors import UserError
from nanochat.flags import run_script

COMMANDS = {
    "trace": "profiling.recorded.step_page",
    "diff": "profiling.recorded.diff",
    "static": "profiling.static.report",
    "compiled": "profiling.compiled.report",
    "memory": "profiling.compiled.memory",
    "ablate": "profiling.compiled.ablate",
    "fixes": "profiling.compiled.fixes",
    "counts": "profiling.compiled.count",
    "simulate": "profiling.predicted.simulate",
    "points": "profiling.predicted.points",
    "calibrate": "profiling.predicted.calibrate",
    "ledger": "profiling.predicted.ledger",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m profiling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    name = parser.parse_args(sys.argv[1:2]).command
    try:
        module = importlib.import_module(COMMANDS[name])
    except ModuleNotFoundError as missing:
        raise UserError(f"`{name}` cannot run here: there is no module {missing.name}") from None
    sys.argv[:2] = [f"python -m profiling {name}"]
    module.main()


if __name__ == "__main__":
    run_script(main, goes_on=True)
