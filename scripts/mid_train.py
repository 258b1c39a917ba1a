"""Mid-training: the base model learns the form of conversations, multiple choice, tool use and spelling."""

from nanochat.chat_stages import ChatFlags, run_chat_stage
from nanochat.flags import parse, run_script


def main() -> None:
    defaults = ChatFlags(init_lr_frac=1.0, warmdown_ratio=0.2)
    from profiling.recorded.record import watcher

    flags = parse(ChatFlags, __doc__ or "", defaults=defaults)
    run_chat_stage("mid", flags, watcher(flags.profile))


if __name__ == "__main__":
    run_script(main, goes_on=True)
