"""What a launcher said, in the config: in place of `auto` and of defaults, never in place of what the user wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sft_dist.config.rules_parallel import parallel_problems
from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.parallel.told import Told


def adopt(config: Config, told: Told, notes: list[str]) -> tuple[Config, dict[str, Any]]:
    """`config` with what was told, and the fields that this changed; a line on each goes into `notes`.

    Raises ConfigError where the config says something else, or where the two together cannot be.
    """
    adopted, refused, hint = {}, [], None
    default = Config()
    for name, value in told.fields.items():
        mine = value_of(config, name)
        if mine == value:
            continue
        if mine not in ("auto", value_of(default, name)):
            refused.append(f"{name} is {mine!r}, but accelerate launch was told {value} ({told.words[name]})")
            standard = value_of(default, name)
            hint = (
                hint
                or f"leave {name} on {standard}, or launch with {told.words[name].partition(':')[0]} as the config has it"
            )
            if name == "parallel.plan":
                hint = f"leave parallel.plan on auto, or launch with launch/accelerate/{mine}.yaml"
            continue
        adopted[name] = value
        notes.append(f"{name} = {value}: accelerate launch was told so ({told.words[name]})")
    if refused:
        raise ConfigError(refused[0], problems=refused[1:], hint=hint)
    together = with_values(config, adopted)
    before = {problem.line for problem in parallel_problems(config)}
    problems = [problem.line for problem in parallel_problems(together) if problem.line not in before]
    if problems:
        raise ConfigError("what accelerate launch was told does not go with the config", problems=problems)
    return together, adopted


def accumulated(config: Config, told: Told, devices: int, notes: list[str]) -> Config:
    """`config` with the micro batch that the number of micro batches which was told makes of a device's share of rows.

    Raises ConfigError where that is no whole number, or not the one that the config says.
    """
    count, total, asked = told.accumulation, config.train.global_batch_size, config.train.per_device_train_batch_size
    if count is None:
        return config
    micro, rest = divmod(total // devices, count)
    if rest or not micro or asked not in ("auto", micro):
        now = f" / {asked} a micro batch" if asked != "auto" else ""
        raise ConfigError(
            f"accelerate launch was told gradient_accumulation_steps: {count}, but train.global_batch_size is {total} / "
            f"{devices} device(s){now}",
            hint="set gradient_accumulation_steps to auto in its file (or 1 without one): it follows from the other numbers",
        )
    if asked == "auto":
        notes.append(
            f"train.per_device_train_batch_size = {micro}: accelerate launch was told {count} micro batches a step"
        )
    return with_values(config, {"train.per_device_train_batch_size": micro})


def value_of(config: Config, name: str) -> Any:
    """The value of the dotted field `name`."""
    section, key = name.split(".")
    return getattr(getattr(config, section), key)


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """`config` with other values of these dotted fields."""
    for name, value in values.items():
        section, key = name.split(".")
        changed = getattr(config, section).model_copy(update={key: value})
        config = config.model_copy(update={section: changed})
    return config
