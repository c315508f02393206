"""`python -m sft_dist.train RUN_DIR|CONFIG`: the worker as a process of its own, for launchers and job scripts."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sft_dist.config.loader import load_config, load_run_config, write_config
from sft_dist.errors import ConfigError, RunStopped, SftDistError, exit_status, explained
from sft_dist.files import read_json, write_json, write_text
from sft_dist.jobs.last_words import held_run, leaving_words
from sft_dist.jobs.launcher import ATTEMPT_HELD, end_with_parent
from sft_dist.jobs.requeue import Settler
from sft_dist.logs import log_to_stderr
from sft_dist.parallel.adopt import with_values
from sft_dist.parallel.resolve import Resolved
from sft_dist.parallel.world import World, this_world, with_told
from sft_dist.process import begin, leave_out, libraries_are_in, run_to_end
from sft_dist.rundir import RunDir, create_run, runs_root
from sft_dist.train import heartbeat
from sft_dist.train.attempt import TWICE, Attempt, attempt, joined
from sft_dist.train.ranks import MainFailed, Ranks, has_met, join, leave
from sft_dist.train.shutdown import Interrupted, StopRequest, heard_while_waiting

# How long a process that fails as the main one does leaves the word to it: hosts start seconds apart.
MAIN_TELLS_S = 15.0


def open_run(argument: str, adopted: Mapping[str, Any]) -> RunDir:
    """The run directory at `argument`, or a new one for the config that it names, with the `adopted` fields on record."""
    run = RunDir(Path(argument))
    if run.config.is_file():
        config, provenance = load_run_config(run.config), read_json(run.provenance) or {}
        if not adopted:
            return run
    else:
        loaded = load_config(argument)
        run = _created(argument, runs_root(loaded.config.run.dir), str(loaded.config.run.name))
        config, provenance = loaded.config, loaded.provenance
    write_text(run.config, write_config(with_values(config, adopted)))
    write_json(run.provenance, {**provenance, **dict.fromkeys(adopted, "accelerate launch")})
    return run


def _created(argument: str, root: Path, name: str) -> RunDir:
    try:
        return create_run(root, name)
    except ConfigError as error:
        there = RunDir(root / name)
        if not there.config.is_file():
            raise
        # What it says is for `sft-dist train`, which takes fields and --overwrite.
        choices = [f"keep both      another run.name in {argument}", f"replace it     remove {there.quoted} first"]
        if not (there.model / "DONE").is_file():
            choices.insert(0, f"go on with it  {there.quoted} in place of {argument}")
        raise ConfigError(error.message.splitlines()[0], problems=choices) from None


def main(arguments: list[str]) -> int:
    """Train; the exit status is that of the error, as `sft-dist` gives it, but for a stopped run under a launcher: 0."""
    log_to_stderr()
    if len(arguments) != 1 or arguments[0].startswith("-"):
        more = "; fields and options are for sft-dist train, here they stand in CONFIG" if len(arguments) > 1 else ""
        sys.stderr.write(f"usage: python -m sft_dist.train RUN_DIR|CONFIG{more}\n")
        return 2
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun ends its workers unless it is killed itself. They would go on beside the ones of the next attempt.
        end_with_parent(signal.SIGKILL)
    world = World()
    try:
        world = this_world()
        run = os.environ.get(ATTEMPT_HELD)
        heartbeat.begin(world.rank, Path(run) if run else None)
        if world.rank:
            logging.getLogger().setLevel(logging.ERROR)
        world = with_told(world)
        # Libraries load for seconds: whoever asks for a stop meanwhile gets no traceback. What fails before the processes
        # meet is put down here, later failures where the run is entered.
        with StopRequest(started=_started(world)), leaving_words(held_run(ATTEMPT_HELD), world.rank):
            _train(arguments[0], world)
    except MainFailed as error:
        _let_main_tell()
        return exit_status(error)
    except KeyboardInterrupt:
        return _stopped(Interrupted(TWICE), world)
    except RunStopped as error:
        return _stopped(error, world)
    except (SftDistError, OSError) as error:
        # A wrong config is wrong for every process, and what fails before they meet fails for all of a node.
        if world.rank == 0:
            sys.stderr.write(explained(error))
        elif not isinstance(error, ConfigError) and (world.local_rank == 0 or has_met()):
            sys.stderr.write(f"rank {world.rank}: {explained(error).splitlines()[0]}\n")
        else:
            _let_main_tell()
            sys.stderr.write(f"rank {world.rank}: {explained(error)}")
        return exit_status(error)
    except Exception:
        if not _told_elsewhere():
            raise
        return RunStopped.exit_code
    finally:
        leave()
    return 0


def _started(world: World) -> bool:
    """Whether a launcher has started this process, which hears signals as well and passes them on."""
    return world.launched or ATTEMPT_HELD in os.environ


def _told_elsewhere() -> bool:
    """Whether another process has left because it was told to: this one only missed it, which is no news to anybody."""
    run = held_run(ATTEMPT_HELD)
    with contextlib.suppress(OSError):
        return run is not None and run.read_status().get("state") == "stopped"
    return False


def _stopped(error: RunStopped, world: World) -> int:
    """The exit status of a process that was asked to stop. Whoever holds the attempt says it.

    A launcher takes any other status than 0 for a failure and ends the processes that are still saving.
    """
    run = held_run(ATTEMPT_HELD)
    if world.rank == 0 and run is None:
        sys.stderr.write(explained(error))
    if not world.launched or not isinstance(error, Interrupted):
        return 0 if world.launched else exit_status(error)
    # It left by itself, perhaps before it had entered the run: the others will only miss it.
    with contextlib.suppress(OSError):
        if run is not None and run.read_status().get("state") == "running":
            run.write_status(state="stopped", reason=error.message, exit_status=exit_status(error))
    return exit_status(error)


def _leave_alone(number: int, world: World) -> None:
    """End this process, which waits for another one that may have gone."""
    error = Interrupted(f"stopped by {signal.Signals(number).name} while the processes met")
    os._exit(_stopped(error, world))


def _let_main_tell() -> None:
    """Wait, so that the main process says what is wrong: when it ends, the launcher ends this one here.

    The launcher would end the main one before it has spoken if this one were first. Returns if nothing has come.
    """
    time.sleep(MAIN_TELLS_S)


def _train(argument: str, world: World) -> None:
    from sft_dist.evaluate.asking import asking
    from sft_dist.train.pretrained import resolve_model
    from sft_dist.train.settle import as_main, needs_packages, record_environment, resolve_here, unused_packages
    from sft_dist.train.worker import train

    there = RunDir(Path(argument)) if RunDir(Path(argument)).config.is_file() else None
    config = load_run_config(there.config) if there else load_config(argument).config
    resolved = resolve_here(config, run=there, world=world)
    needs_packages(resolved.config, resolved)
    leave_out(unused_packages(resolved.config, resolved))
    if resolved.layout.plan.engine != "none" and not world.launched:
        raise ConfigError(
            f"parallel.plan {resolved.plan} is {resolved.layout.world_size} process(es) of a launcher, this is none",
            hint=f"start it with: sft-dist train {argument}, or torchrun --nproc-per-node N -m sft_dist.train {argument}",
        )
    if resolved.given:
        from sft_dist.train.deepspeed_keys import check_deepspeed

        check_deepspeed(resolved.given)
    for source in (config.model.name, config.model.tokenizer or config.model.name):
        resolve_model(source)  # once they have met, transformers saves what is built on the main process only
    with heard_while_waiting(lambda number: _leave_alone(number, world)):
        ranks = join(world, use_cpu=resolved.use_cpu)
    mine = resolved
    resolved = as_main(ranks, lambda: mine, mine.num_threads)
    run = _open_together(argument, resolved, ranks)
    with _entered(run, ranks, started=_started(world)) as current, leaving_words(run, ranks.rank):
        if ranks.is_main and not os.environ.get(ATTEMPT_HELD):
            record_environment(run, resolved)
            current.facts["gpus"] = resolved.gpus
        importlib.import_module("sft_dist.train.trainer")  # TRL, and with it all that takes seconds
        libraries_are_in()
        train(run, current, resolved, ranks, asking(run, resolved, current, ranks))


def _open_together(argument: str, resolved: Resolved, ranks: Ranks) -> RunDir:
    """The main process opens or makes the run; the others learn which one."""

    def opened() -> RunDir:
        run = open_run(argument, resolved.adopted)
        if (run.model / "DONE").is_file():
            hint = "train under another run.name"
            raise ConfigError(f"run {run.name} is done, its model is in {run.model}", hint=hint)
        return run

    return ranks.by_main(opened)


@contextlib.contextmanager
def _entered(run: RunDir, ranks: Ranks, *, started: bool) -> Iterator[Attempt]:
    """The attempt: of this process, unless a launcher or the main process keeps its record."""
    with contextlib.ExitStack() as stack:
        if not os.environ.get(ATTEMPT_HELD):
            entered: list[Attempt] = []
            # The others wait: a run that another launcher holds is not theirs either.
            ranks.by_main(lambda: entered.append(stack.enter_context(attempt(run, Settler(run), started=started))))
            yield entered[0] if entered else stack.enter_context(joined(run, reports=False))
            return
        yield stack.enter_context(joined(run, reports=ranks.is_main))


if __name__ == "__main__":
    begin()
    run_to_end(lambda: main(sys.argv[1:]))
