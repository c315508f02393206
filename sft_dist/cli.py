"""The command line: one short function a command. stdout is the result, stderr is logs and progress."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sft_dist.cli_data import TAKES_OVERRIDES, ConfigArgument, Overrides, data_app, load
from sft_dist.cli_jobs import register
from sft_dist.cli_plan import plan
from sft_dist.cli_submit import AcceptFlag, submit
from sft_dist.errors import ConfigError, SftDistError, exit_status, explained
from sft_dist.logs import log_to_stderr

if TYPE_CHECKING:
    from sft_dist.rundir import RunDir

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
app.command(context_settings=TAKES_OVERRIDES)(plan)
app.command(context_settings=TAKES_OVERRIDES)(submit)
register(app)

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run's name or directory.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


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
    from sft_dist.stages import new_run, run_here

    run = new_run(load(config, overrides), overwrite=overwrite)
    logging.getLogger(__name__).info("run %s in %s", run.name, run.path)
    run_here(run)
    _show_result(run)


@app.command()
def resume(run: RunArgument, accept: AcceptFlag = False) -> None:
    """Go on with a stopped or failed run, from its newest complete checkpoint. Example: sft-dist resume demo"""
    from sft_dist.cli_runs import ready_here
    from sft_dist.stages import run_here

    found = ready_here(run, accept=accept)
    run_here(found)
    _show_result(found)


@app.command()
def evaluate(
    run: RunArgument,
    before: Annotated[bool, typer.Option("--before", help="Score the base model instead of the tuned one.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Ask and score a run's model again. Example: sft-dist evaluate demo"""
    from sft_dist.config.loader import load_run_config
    from sft_dist.evaluate.compare import wants_evaluation
    from sft_dist.parallel.resolve import one_process
    from sft_dist.rundir import find_run
    from sft_dist.stages import evaluate_here, report_here
    from sft_dist.train.settle import resolve_here

    found = find_run(run)
    settings = load_run_config(found.config)
    if not wants_evaluation(settings):
        raise ConfigError(f"run {found.name} has neither evaluate.questions nor evaluate.data, so nothing to ask")
    evaluate_here(settings, found, resolve_here(one_process(settings)), "before" if before else "after")
    report_here(found)
    _show_result(found, as_json=as_json)


@app.command()
def chat(run: RunArgument) -> None:
    """Talk to a run's model. Example: sft-dist chat demo"""
    from sft_dist.config.loader import load_run_config
    from sft_dist.parallel.resolve import one_process
    from sft_dist.rundir import find_run

    found = find_run(run)
    settings = load_run_config(found.config)
    from sft_dist.train.settle import resolve_here

    resolved = resolve_here(one_process(settings))
    from transformers import TextStreamer

    from sft_dist.evaluate.chat import HELP
    from sft_dist.evaluate.chat import chat as talk
    from sft_dist.evaluate.compare import load_for

    loaded = load_for(settings, found, resolved, "after")
    print(HELP, file=sys.stderr)
    prompt = "> " if sys.stdin.isatty() else ""
    talk(
        settings,
        loaded,
        lambda: input(prompt),
        TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True),
        lambda line: print(line, file=sys.stderr),
    )


@app.command()
def report(run: RunArgument) -> None:
    """Write report.html and loss.png of a run and print the path. Example: sft-dist report demo"""
    from sft_dist.rundir import find_run
    from sft_dist.stages import report_here

    found = find_run(run)
    report_here(found)
    print(found.report)


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
        sys.stderr.write(explained(error))
        sys.exit(exit_status(error))


def _show_result(run: RunDir, *, as_json: bool = False) -> None:
    """Scores and samples of a run, and where to look further."""
    from rich.console import Console

    from sft_dist.files import read_json
    from sft_dist.report.tables import result_tables

    if as_json:
        print(json.dumps(read_json(run.scores) or {}, indent=2))
        return
    for table in result_tables(run):
        Console(highlight=False).print(table)
    if run.report.is_file():
        print(run.report)
