"""Tasks of EleutherAI's lm-evaluation-harness, by name: its prompts and metrics, our intervals and tests."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sft_dist.config.schema import Config, HarnessConfig
from sft_dist.errors import ConfigError, PreflightError

if TYPE_CHECKING:
    from sft_dist.evaluate.asked import Asked
    from sft_dist.evaluate.compare import Loaded

log = logging.getLogger(__name__)


def prove_tasks(config: Config) -> None:
    """Load each task of `evaluate.harness` once, which fetches its rows where there is a network.

    Raises ConfigError for a name that the harness does not know, PreflightError for a task that cannot be loaded here.
    """
    if config.evaluate.harness is not None:
        manager = _manager(config.evaluate.harness)
        for name in config.evaluate.harness.tasks:
            if name not in manager.all_tasks:
                raise ConfigError(
                    f"evaluate.harness.tasks: lm-eval knows no task {name!r}",
                    hint="lm-eval ls tasks lists those it knows; evaluate.harness.include_path names a folder with yours",
                )
            try:
                manager.load([name])
            except Exception as error:
                said = str(error).splitlines() or [type(error).__name__]
                raise PreflightError(
                    f"evaluate.harness.tasks: {name} cannot be loaded: {said[0]}",
                    hint="its rows must be in the cache of the Hub or reachable; fetch them where there is a network",
                ) from error


def harness_rows(config: Config, loaded: Loaded, asked: Asked) -> list[dict[str, Any]]:
    """A row for each row of each task, as those of the sets; the parts of a group are its categories.

    What `asked` has of a task is not asked again; a task that is another process's is left out.
    """
    options = config.evaluate.harness
    if options is None:
        return []
    rows: list[dict[str, Any]] = []
    told = options.model_dump(exclude={"tasks", "batch_size"})
    for number, name in enumerate(options.tasks):
        key = asked.key("harness", name, told)
        if key not in asked:
            if not asked.is_mine(number):
                continue
            log.info("asking the task %s of lm-eval", name)
            asked.keep(key, list(_scored(name, _samples(name, options, loaded))))
        rows += asked[key]
    return rows


@functools.cache
def _manager(options: HarnessConfig) -> Any:
    """The tasks by name. To list the harness's own takes seconds, which is left out where the user's are enough."""
    from lm_eval.tasks import TaskManager

    if not os.environ.get(
        "SFT_DIST_DEBUG"
    ):  # what a task's file leaves to defaults, and that the model is there already
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if options.include_path is not None:
        own = TaskManager(include_path=options.include_path, include_defaults=False)
        if set(options.tasks) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=options.include_path)


def _samples(name: str, options: HarnessConfig, loaded: Loaded) -> dict[str, list[dict[str, Any]]]:
    """What the harness says of each row, by the task that it belongs to: one, or the parts of a group."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    # It asks git about the current folder, and git complains on stderr where that is no repository.
    evaluator.get_git_commit_hash = lambda: None
    model = HFLM(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        batch_size=options.batch_size,
        max_batch_size=options.batch_size,
    )
    found = evaluator.simple_evaluate(
        model=model,
        tasks=[name],
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        apply_chat_template=options.apply_chat_template,
        task_manager=_manager(options),
        bootstrap_iters=0,
        # Those of the process stay what they are: a training may follow. Few-shot examples are drawn by their own seed.
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
    )
    return found["samples"] if found else {}


def _scored(name: str, samples: dict[str, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    parts = [(part, sample) for part in sorted(samples) for sample in _by_row(samples[part])]
    for index, (part, sample) in enumerate(parts):
        prompt, answer, expected = _said(sample)
        yield {
            "kind": "scored",
            "set": name,
            "index": index,
            "category": part if len(samples) > 1 else None,
            "prompt": prompt,
            "expected": expected,
            "answer": answer,
            "exact_match": None,
            "predicted_label": None,
            "label_correct": None,
            "label_logprobs": None,
            "scores": sample["scores"],
        }


def _by_row(samples: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One for each row: a task may look at an answer through several filters, whose metrics are told apart by name."""
    rows: dict[Any, dict[str, Any]] = {}
    for sample in samples:
        row = rows.setdefault(sample["doc_id"], {**sample, "scores": {}})
        several = sample["filter"] not in ("none", row["filter"])
        for metric in sample["metrics"]:
            value = sample[metric]
            # Others, such as a perplexity's log-probability, alone or with the number of words, are no means over rows.
            if isinstance(value, (bool, int, float)) and "perplexity" not in metric:
                row["scores"][f"{metric}.{sample['filter']}" if several else metric] = round(float(value), 6)
    yield from (rows[key] for key in sorted(rows))


def _said(sample: dict[str, Any]) -> tuple[str, str, str]:
    """Prompt, answer and expected answer as text. Among several choices the answer is the likeliest one."""
    arguments, target = sample["arguments"], sample["target"]
    prompt = str(arguments[0][0])
    if len(arguments) == 1 and not isinstance(arguments[0][1], str):
        return prompt, str(sample["filtered_resps"][0]).strip(), str(target).strip()
    choices = [str(argument[1]).strip() for argument in arguments]
    likelihoods = [float(response[0]) for response in sample["filtered_resps"]]
    chosen = choices[max(range(len(choices)), key=lambda place: likelihoods[place])]
    known = isinstance(target, int) and 0 <= target < len(choices)
    return prompt, chosen, choices[target] if known else str(target).strip()
