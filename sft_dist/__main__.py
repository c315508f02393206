"""`python -m sft_dist`, the same as `sft-dist`."""

import sys


def main() -> None:
    """The console script. What starts a run holds early signals back before anything that takes time is imported."""
    from sft_dist.process import begin

    begin()
    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    if verb in ("train", "resume"):
        from sft_dist.train.shutdown import hold_early_signals

        hold_early_signals()
    from sft_dist.cli import main as run_command

    run_command()


if __name__ == "__main__":
    main()
