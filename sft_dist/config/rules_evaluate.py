"""What must hold between the fields that say what a model is asked and how its answers are scored."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from sft_dist.config.schema import Config, GenerationConfig
from sft_dist.config.spelling import Problem, did_you_mean, shown

# How the answers of a set may be scored, beside functions of the user's own (sft_dist/evaluate/metrics.py), and the names of
# what each gives a row. `json` and `fields` give one for each field, too: `json.NAME`.
SCORES = {
    "exact": ("exact",),
    "contains": ("contains",),
    "numeric": ("numeric",),
    "json": ("json_all", "json_valid", "json_fields"),
    "fields": ("fields_all", "fields"),
    "label": ("label",),
    "rouge": ("rougeL", "rouge1", "rouge2"),
    "chrf": ("chrf",),
    "bleu": ("bleu",),
    "perplexity": ("perplexity",),
}
METRICS = tuple(SCORES)
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def metric_of(score: str) -> str | None:
    """The metric of ours whose score has this name; None if it is free for a function of the user's."""
    by_field, dot, _ = score.partition(".")
    if dot:
        return by_field if by_field in ("json", "fields") else None
    # `n` is what evaluate.during calls the number of rows.
    ours = {name: metric for metric, names in SCORES.items() for name in (metric, *names)} | {"n": "n"}
    return ours.get(score)


def evaluate_problems(config: Config) -> Iterator[Problem]:
    """Each contradiction between fields of `config.evaluate`."""
    for check in (_generation, _during, _labels, _sets, _harness):
        yield from check(config)


def _generation(config: Config) -> Iterator[Problem]:
    generation, default = config.evaluate.generation, GenerationConfig()
    if generation.do_sample:
        return
    for name in ("temperature", "top_p", "top_k"):
        value = getattr(generation, name)
        if value != getattr(default, name):
            problem = f"{value:g} would be ignored, since do_sample is false; set do_sample: true, or take it out"
            yield Problem(f"evaluate.generation.{name}", problem, ("evaluate.generation.do_sample",))


def _during(config: Config) -> Iterator[Problem]:
    if config.evaluate.during is not None and not config.evaluate.all_sets:
        problem = "would ask nothing: set evaluate.data or evaluate.sets, whose rows are asked"
        yield Problem("evaluate.during", problem, ("evaluate.data", "evaluate.sets"))


def _labels(config: Config) -> Iterator[Problem]:
    places = [("evaluate.labels", config.evaluate.labels)]
    places += [(f"evaluate.sets[{index}].labels", it.labels) for index, it in enumerate(config.evaluate.sets)]
    for where, labels in places:
        if any(not label.strip() for label in labels):
            yield Problem(where, "holds an empty label")
        for label in sorted({label for label in labels if label.strip() and labels.count(label) > 1}):
            yield Problem(where, f"{shown(label)} is listed {labels.count(label)} times")


def _harness(config: Config) -> Iterator[Problem]:
    names = [it.name for it in config.evaluate.all_sets]
    tasks = config.evaluate.harness.tasks if config.evaluate.harness else ()
    for task in dict.fromkeys(tasks):
        if task in names:
            yield Problem("evaluate.harness.tasks", f"{shown(task)} is also the name of a set; rename the set")
        elif tasks.count(task) > 1:
            yield Problem("evaluate.harness.tasks", f"{shown(task)} is listed {tasks.count(task)} times")


def _sets(config: Config) -> Iterator[Problem]:
    names = [it.name for it in config.evaluate.all_sets]
    for index, it in enumerate(config.evaluate.sets):
        where = f"evaluate.sets[{index}]"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", it.name):
            yield Problem(f"{where}.name", f"{shown(it.name)} is not a name of letters, digits, '.', '_' and '-'")
        elif names.count(it.name) > 1:
            taken = " (evaluate.data is the set `data`)" if it.name == "data" else ""
            yield Problem(f"{where}.name", f"{shown(it.name)} stands for {names.count(it.name)} sets{taken}")
        if not it.metrics:
            yield Problem(f"{where}.metrics", "is empty, so nothing would be scored")
        for metric in dict.fromkeys(it.metrics):
            if metric not in METRICS and not FUNCTION.fullmatch(metric):
                guess = did_you_mean(metric, METRICS)
                yield Problem(
                    f"{where}.metrics",
                    f"{shown(metric)} is not one of {', '.join(METRICS)}, nor module:function{guess}",
                )
            elif it.metrics.count(metric) > 1:
                yield Problem(f"{where}.metrics", f"{shown(metric)} is listed {it.metrics.count(metric)} times")
        yield from _own_names(it.metrics, f"{where}.metrics")
        if "label" in it.metrics and not it.labels:
            yield Problem(f"{where}.labels", "is not set, and the metric label ranks them")
        elif it.labels and "label" not in it.metrics:
            yield Problem(f"{where}.labels", "would be ignored: metrics holds no `label`")


def _own_names(metrics: Sequence[str], where: str) -> Iterator[Problem]:
    """Functions whose score would be taken for another one."""
    own = [metric for metric in metrics if metric not in METRICS and FUNCTION.fullmatch(metric)]
    named: dict[str, list[str]] = {}
    for metric in dict.fromkeys(own):
        named.setdefault(metric.rpartition(":")[2], []).append(metric)
    for name, functions in named.items():
        if metric_of(name) is not None:
            yield Problem(
                where,
                f"{shown(functions[0])} has a name that a score of ours has; call the function my_{name} or otherwise",
            )
        elif len(functions) > 1:
            several = " and ".join(map(shown, functions))
            yield Problem(
                where, f"{several} would both be called {name}, and one be lost; give them names of their own"
            )
