"""Reinforcement learning: the chat model practises questions with known answers; what was right gets likelier."""

from nanochat.flags import parse, run_script
from nanochat.rl_stage import RLFlags, run_rl


def main() -> None:
    from profiling.recorded.record import watcher

    flags = parse(RLFlags, __doc__ or "")
    run_rl(flags, watcher(flags.profile))


if __name__ == "__main__":
    run_script(main, goes_on=True)
