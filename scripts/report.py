"""Writes report.md and report.html of a run, and shows what matters of it."""

import sys
from dataclasses import dataclass

from nanochat import render, report, scores
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
    for note in report.missing(run):
        print(f"note: {note}", file=sys.stderr)
    title, content = f"Report of run {run.name}", report.sections(run)
    figures = [one for section in content for one in section.blocks if isinstance(one, render.Figure) and one.file]
    for figure in figures:
        write_atomically(run.folder / figure.file, render.standing_alone(figure).encode())
    for name, text in (("report.md", render.markdown(title, content)), ("report.html", render.page(title, content))):
        write_atomically(run.folder / name, text.encode("utf-8", "backslashreplace"))  # data's paths may be any bytes
    for section in (
        *scores.sections(run),
        report.conversations(run) if report.latest_chat(run)[1] else report.samples(run),
    ):
        if section.blocks:
            shown = render.markdown(section.title, [render.Section("", section.blocks)], links=False)
            print(shown.replace("## \n\n", ""))
    print(f"The whole report: {run.folder / 'report.html'} (and report.md)")


if __name__ == "__main__":
    run_script(main, goes_on=True)
