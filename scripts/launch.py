"""Runs a training script on several GPUs of this machine.

python -m scripts.launch --gpus 8 scripts.base_train -- --depth=24
"""

import argparse
import importlib.util
import sys

from nanochat.errors import UserError
from nanochat.flags import run_script
from nanochat.launch import launch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--gpus", type=int, required=True, help="ranks to start, a GPU each")
    parser.add_argument("module", help="the script, as scripts.base_train")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="after --: the script's own flags")
    flags = parser.parse_args()
    if not 1 <= flags.gpus <= 64:
        raise UserError(f"--gpus is {flags.gpus}, wanted 1 to 64")
    try:
        there = importlib.util.find_spec(flags.module)
    except (ImportError, ValueError):  # of a package that is none, of dots
        there = None
    if not there:
        raise UserError(f"there is no script {flags.module!r}; wanted one as scripts.base_train")
    args = flags.args[1:] if flags.args[:1] == ["--"] else flags.args
    sys.exit(launch(flags.module, args, flags.gpus))


if __name__ == "__main__":
    run_script(main, goes_on=True)
