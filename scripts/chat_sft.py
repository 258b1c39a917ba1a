"""Supervised fine-tuning: the model learns to be the assistant; only the assistant's own tokens are trained."""

from nanochat.chat_stages import ChatFlags, run_chat_stage
from nanochat.flags import parse, run_script


def main() -> None:
    from profiling.recorded.record import watcher

    flags = parse(ChatFlags, __doc__ or "")
    run_chat_stage("sft", flags, watcher(flags.profile))


if __name__ == "__main__":
    run_script(main, goes_on=True)
