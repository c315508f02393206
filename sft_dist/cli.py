"""The command line: one short function a command. stdout is the result, stderr is logs and progress."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from sft_dist.cli_check import JsonFlag, check, doctor
from sft_dist.cli_data import TAKES_OVERRIDES, ConfigArgument, Overrides, data_app, load
from sft_dist.cli_jobs import register
from sft_dist.cli_plan import plan
from sft_dist.cli_submit import AcceptFlag, submit
from sft_dist.errors import ConfigError, SftDistError, exit_status, explained
from sft_dist.logs import log_to_stderr

app = typer.Typer(
    help="One supervised fine-tuning run, from a laptop's CPU to a SLURM job, from the same YAML.",
    epilog="Example: sft-dist train demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
app.command()(doctor)
app.command(context_settings=TAKES_OVERRIDES)(check)
app.command(context_settings=TAKES_OVERRIDES)(plan)
app.command(context_settings=TAKES_OVERRIDES)(submit)
register(app)

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run's name or directory.")]


@app.callback(invoke_without_command=True)
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks for every error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the versions and exit.")] = False,
) -> None:
    """One supervised fine-tuning run, from a laptop's CPU to a SLURM job, from the same YAML."""
    log_to_stderr()
    if version:
        from sft_dist.train.environment import versions

        print("\n".join(f"{name} {number}" for name, number in versions().items()))
        raise typer.Exit


@app.command()
def recipes() -> None:
    """List the packaged recipes."""
    from sft_dist.config.loader import list_recipes

    for name, line in list_recipes().items():
        print(f"{name:14} {line}")


@app.command()
def init(
    recipe: Annotated[str, typer.Argument(help="The recipe to start from.")] = "demo",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; NAME.yaml if not given.")
    ] = None,
) -> None:
    """Write a recipe as a YAML file of your own. Example: sft-dist init demo -o my.yaml"""
    from sft_dist.config.loader import read_recipe
    from sft_dist.files import write_text

    path = output or Path(f"{recipe}.yaml")
    text = read_recipe(recipe)
    if path.exists():
        raise ConfigError(f"{path} exists already and is not overwritten", hint="name another file with -o")
    write_text(path, text)
    print(path)


@app.command(context_settings=TAKES_OVERRIDES)
def config(
    config: ConfigArgument,
    overrides: Overrides = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show for each field its value, origin and meaning.")
    ] = False,
    as_json: JsonFlag = False,
    run_dir: Annotated[bool, typer.Option("--run-dir", help="Print only the folder that its run gets.")] = False,
) -> None:
    """Print the resolved config and what `auto` means here. Example: sft-dist config demo --explain"""
    from sft_dist.config.explain import explain as explained
    from sft_dist.config.loader import write_config
    from sft_dist.parallel.machine import this_machine
    from sft_dist.parallel.resolve import resolve
    from sft_dist.rundir import runs_root

    loaded = load(config, overrides)
    if run_dir:
        print(runs_root(loaded.config.run.dir) / str(loaded.config.run.name))
        return
    if as_json:
        print(loaded.config.model_dump_json(indent=2))
    elif explain:
        for path, value, origin, doc in explained(loaded):
            print(f"{path} = {json.dumps(value, ensure_ascii=False)}   [{origin}]\n    {doc}")
    else:
        print(write_config(loaded.config), end="")
    if as_json:
        return
    try:
        lines = resolve(loaded.config, this_machine()).decisions
    except ConfigError as error:
        lines = (f"this machine cannot run it: {error.message}", *([error.hint] if error.hint else []))
    for line in lines:
        print(f"# here: {line}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a config, for editors. Example: sft-dist schema > sft-dist.schema.json"""
    from sft_dist.config.explain import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command(context_settings=TAKES_OVERRIDES)
def train(
    config: ConfigArgument,
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an existing run of this name first.")] = False,
) -> None:
    """Run here: ask before, train, ask after, report. Example: sft-dist train demo train.learning_rate=1e-5"""
    from sft_dist.cli_runs import loaded_here, show_result
    from sft_dist.stages import new_run, run_here

    run = new_run(loaded_here(config, overrides, *["--overwrite"] * overwrite), overwrite=overwrite)
    logging.getLogger(__name__).info("run %s in %s", run.name, run.path)
    run_here(run)
    show_result(run)


@app.command()
def resume(run: RunArgument, accept: AcceptFlag = False) -> None:
    """Go on with a stopped or failed run, from its newest complete checkpoint. Example: sft-dist resume demo"""
    from sft_dist.cli_runs import ready_here, show_result
    from sft_dist.stages import run_here

    found = ready_here(run, accept=accept)
    run_here(found)
    show_result(found)


@app.command(context_settings=TAKES_OVERRIDES)
def evaluate(
    run: RunArgument,
    overrides: Overrides = None,
    before: Annotated[bool, typer.Option("--before", help="Score the base model instead of the tuned one.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Ask anew what has been answered.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Ask a run's model what it was not asked yet, or fields of evaluate add; show both. Example: sft-dist evaluate demo"""
    from sft_dist.cli_evaluate import evaluated
    from sft_dist.cli_runs import show_result

    flags = [*["--before"] * before, *["--again"] * again, *["--json"] * as_json]
    show_result(evaluated(run, overrides or [], before=before, again=again, flags=flags), as_json=as_json)


@app.command()
def chat(run: RunArgument) -> None:
    """Talk to a run's model. Example: sft-dist chat demo"""
    from sft_dist.cli_runs import opened
    from sft_dist.parallel.resolve import one_process

    found, settings = opened(run, "chat", talks=True)
    from sft_dist.train.settle import resolve_here

    resolved = resolve_here(one_process(settings))
    from transformers import TextStreamer

    from sft_dist.evaluate.chat import HELP
    from sft_dist.evaluate.chat import chat as talk
    from sft_dist.evaluate.compare import load_for

    loaded = load_for(settings, found, resolved, "after")
    print(HELP, file=sys.stderr)
    prompt = "> " if sys.stdin.isatty() else ""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a file of another encoding may come through a pipe
    talk(
        settings,
        loaded,
        lambda: input(prompt),
        TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True),
        lambda line: print(line, file=sys.stderr),
    )


@app.command()
def export(
    run: RunArgument,
    to: Annotated[str, typer.Option("--to", help="A folder that is not there yet, or hub:OWNER/NAME.")],
    public: Annotated[bool, typer.Option("--public", help="Let everybody see a new repository.")] = False,
) -> None:
    """Copy or upload a run's final model, proven before and after. Example: sft-dist export demo --to /models/demo"""
    from sft_dist.evaluate.deliver import deliver
    from sft_dist.rundir import find_run

    print(deliver(find_run(run), to, public=public))


@app.command()
def report(
    runs: Annotated[list[str] | None, typer.Argument(metavar="[RUN]...", help="Runs' names or directories.")] = None,
    index: Annotated[bool, typer.Option("--index", help="List all runs in index.html instead.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where a comparison or the list goes.")] = None,
) -> None:
    """Write the report of a run, compare several, or list all; prints the path. Example: sft-dist report demo"""
    from sft_dist.cli_runs import write_reports

    print(write_reports(runs or [], index=index, out=out))


def main() -> None:
    """The console script: turns exceptions into one clear screen and an exit status."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if len(arguments) != len(sys.argv) - 1:
        os.environ["SFT_DIST_DEBUG"] = "1"
    try:
        app(args=arguments)  # usage errors and --help end here, with typer's own message and status
    except (SftDistError, OSError) as error:
        if os.environ.get("SFT_DIST_DEBUG"):
            raise
        with contextlib.suppress(OSError):  # nobody reads it any more
            sys.stderr.write(explained(error))
        sys.exit(exit_status(error))
