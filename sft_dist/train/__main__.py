"""`python -m sft_dist.train RUN_DIR|CONFIG`: the worker as a process of its own, for launchers and job scripts."""

from __future__ import annotations

import sys
from pathlib import Path

from sft_dist.config.loader import load_config, load_run_config, write_config
from sft_dist.errors import ConfigError, SftDistError, exit_status, explained
from sft_dist.files import write_json, write_text
from sft_dist.logs import log_to_stderr
from sft_dist.rundir import RunDir, create_run, runs_root


def open_run(argument: str) -> RunDir:
    """The run directory at `argument`, or a new one for the config that it names."""
    if RunDir(Path(argument)).config.is_file():
        return RunDir(Path(argument))
    loaded = load_config(argument)
    run = create_run(runs_root(loaded.config.run.dir), str(loaded.config.run.name))
    write_text(run.config, write_config(loaded.config))
    write_json(run.provenance, loaded.provenance)
    return run


def main(arguments: list[str]) -> int:
    """Train; the exit status is that of the error, as `sft-dist` gives it."""
    log_to_stderr()
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.stderr.write("usage: python -m sft_dist.train RUN_DIR|CONFIG\n")
        return 2
    try:
        from sft_dist.train.attempt import attempt
        from sft_dist.train.worker import record_environment, resolve_here, train

        run = open_run(arguments[0])
        if (run.model / "DONE").is_file():
            raise ConfigError(
                f"run {run.name} is done, its model is in {run.model}", hint="train under another run.name"
            )
        with attempt(run) as current:
            resolved = resolve_here(load_run_config(run.config))
            record_environment(run, resolved)
            train(run, current, resolved)
    except (SftDistError, OSError) as error:
        sys.stderr.write(explained(error))
        return exit_status(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
