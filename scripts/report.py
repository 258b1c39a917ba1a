"""Writes report.md of a run, and shows what matters of it."""

from dataclasses import dataclass

from nanochat import report
from nanochat.errors import UserError
from nanochat.files import write_atomically
from nanochat.flags import flag, parse, run_script
from nanochat.run import Run


@dataclass
class Flags:
    run: str = flag("speedrun", "name of the run: its folder under $NANOCHAT_BASE_DIR/runs", "--model-tag", "-g")


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    run = Run.open(flags.run)
    if not run.folder.is_dir():
        raise UserError(f"there is no run {run.name!r} in {run.folder.parent}; train one with speedrun.sh")
    text = report.markdown(run)
    write_atomically(run.folder / "report.md", text.encode())
    for part in (report.evaluation(run), report.samples(run)):
        if part:
            print(f"{part}\n")
    print(f"The whole report: {run.folder / 'report.md'}")


if __name__ == "__main__":
    run_script(main)
