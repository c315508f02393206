"""The commands below `sft-dist data`, and the arguments that they share with the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sft_dist.errors import ConfigError

if TYPE_CHECKING:
    from sft_dist.config.loader import LoadedConfig

data_app = typer.Typer(help="Make, look at and prepare training data.", no_args_is_help=True, rich_markup_mode=None)

# An unknown option is passed on to the loader, which says how a config field is written.
TAKES_OVERRIDES = {"ignore_unknown_options": True}
ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]", help="Config fields, values as YAML.")]


@data_app.command("make")
def data_make(
    task: Annotated[str, typer.Argument(help="tickets, extraction or mix.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL file, or a folder for three of them.")],
    rows: Annotated[
        int | None, typer.Option(min=1, help="How many rows: 1000 in a file, 8000 train.jsonl of a folder.")
    ] = None,
    held_out: Annotated[
        int, typer.Option(min=1, help="Rows of validation.jsonl and of test.jsonl in a folder.")
    ] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Another seed gives other rows.")] = 1,
    language: Annotated[str | None, typer.Option(help="en or zh; not for mix.")] = None,
    answer: Annotated[str | None, typer.Option(help="json or fields; for extraction.")] = None,
) -> None:
    """Write rows of a synthetic task. Example: sft-dist data make tickets -o tickets.jsonl --rows 500"""
    from sft_dist.data.sources import write_splits, write_task

    options = {name: value for name, value in (("language", language), ("answer", answer)) if value is not None}
    for name, value, known in (("language", language, ("en", "zh")), ("answer", answer, ("json", "fields"))):
        if value is not None and value not in known:
            raise ConfigError(f"--{name} {value} is not one of {', '.join(known)}")
    if output.suffix:
        typer.echo(write_task(task, rows or 1000, seed, output, **options))
        return
    sizes = {"train": rows or 8000, "validation": held_out, "test": held_out}
    for path in write_splits(task, seed, output, sizes, **options):
        typer.echo(path)


@data_app.command("preview", context_settings=TAKES_OVERRIDES)
def data_preview(
    config: ConfigArgument,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows in the table.")] = 3,
    row: Annotated[int, typer.Option(min=1, help="The row whose tokens are shown.")] = 1,
    html: Annotated[Path | None, typer.Option(help="Write a page with many rows instead, the worst first.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Rows on the page.")] = 200,
) -> None:
    """Show rows, and the tokens of one, coloured by whether they are trained. Example: sft-dist data preview demo"""
    from rich.console import Console

    from sft_dist.data_here import page_here, preview_here

    if html is not None:
        typer.echo(page_here(load(config, overrides).config, samples, html))
        return
    console = Console(highlight=False)
    for renderable in preview_here(load(config, overrides).config, rows, row):
        console.print(renderable)


@data_app.command("prepare", context_settings=TAKES_OVERRIDES)
def data_prepare(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Tokenise once into the cache and print the counts. Example: sft-dist data prepare demo"""
    from sft_dist.data.prepared import BeyondLimits
    from sft_dist.data_here import prepare_here

    try:
        ledger = prepare_here(load(config, overrides).config)
    except BeyondLimits as error:
        _show(error.ledger)
        raise
    _show(ledger)


def _show(ledger: dict[str, Any]) -> None:
    from rich.console import Console

    from sft_dist.data.preview import ledger_table

    console = Console(stderr=True, highlight=False)
    console.print(ledger_table(ledger, console.width))
    typer.echo(json.dumps(ledger, indent=2))


def load(config: str, overrides: list[str] | None) -> LoadedConfig:
    """The config that a command was given, with its overrides. Raises ConfigError."""
    from sft_dist.config.loader import load_config

    return load_config(config, overrides or [])
