"""Asking and scoring: batches answer like single prompts, options reach the model, likelihoods are exact."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_dist.config.loader import load_run_config
from sft_dist.config.schema import GenerationConfig
from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.evaluate import compare
from sft_dist.evaluate.compare import Loaded, evaluate_model
from sft_dist.evaluate.continuous import answers_of
from sft_dist.evaluate.generate import generate, left_pad, prompt_ids, settings
from sft_dist.evaluate.likelihood import candidate, label_logprobs
from sft_dist.evaluate.score import exact_match, summarise
from sft_dist.files import read_json, read_jsonl
from sft_dist.rundir import RunDir

NewRun = Callable[..., RunDir]
END = "<|im_end|>"


def label_ids(tokenizer: Any, prompt: Any, label: str) -> list[int]:
    """The tokens that carry a label's score."""
    option = candidate(tokenizer, prompt, label)
    return option.ids[option.first :]


def asked(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


PROMPTS = asked(
    "Hi",
    "Where is my parcel? It should have arrived two days ago, and nothing has come.",
    "I want my money back.",
    "The invoice says 326.00 euros, but the price on your page was lower. " * 4,
    "\U0001f389?",
)


@pytest.fixture
def loaded(tiny_model: Callable[..., Any], tiny_tokens: Callable[..., Any]) -> Loaded:
    """The tiny model in float32 with a head of its own and loud layers, so that what it says depends on what it reads."""
    model = tiny_model()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in model.model.layers.parameters():
            if param.dim() == 2:
                param.mul_(8)
        weight = model.get_input_embeddings().weight
        model.lm_head.weight = torch.nn.Parameter(torch.randn(weight.shape, generator=generator) * 0.5)
    return Loaded(model.eval(), tiny_tokens().tokenizer)


def options(**fields: Any) -> GenerationConfig:
    return GenerationConfig(**{"max_new_tokens": 12, **fields})


def one_by_one(loaded: Loaded, prompts: Sequence[Any], **fields: Any) -> list[list[int]]:
    """New token ids of each prompt, asked alone and unpadded with transformers' own defaults."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt_ids(loaded.tokenizer, prompt)])
        output = loaded.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, **fields
        )
        answers.append(output[0, ids.shape[1] :].tolist())
    return answers


def as_text(loaded: Loaded, ids: Sequence[int]) -> str:
    return str(loaded.tokenizer.decode(ids, skip_special_tokens=True)).strip()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_a_batch_answers_like_each_prompt_alone(loaded: Loaded, batch_size: int) -> None:
    expected = [as_text(loaded, ids) for ids in one_by_one(loaded, PROMPTS)]
    assert len(set(expected)) == len(PROMPTS), "the model says the same to everything: a vain test"
    assert generate(loaded.model, loaded.tokenizer, PROMPTS, options(batch_size=batch_size)) == expected


def test_continuous_batching_answers_like_each_prompt_alone(loaded: Loaded) -> None:
    """On a CPU with a small cache, by the function that GPUs use; prompts wait for the place of others that are answered."""
    rows = [prompt_ids(loaded.tokenizer, prompt) for prompt in PROMPTS]
    chosen = settings(loaded.model, loaded.tokenizer, options())
    small = {"page_size": 32, "num_blocks": 24, "max_batch_tokens": 64, "use_cuda_graph": False}
    # As generate calls it; the batching works in a thread of its own, which is in no such mode.
    with torch.inference_mode():
        found = answers_of(loaded.model, rows, chosen, 1, **small)
    assert found == one_by_one(loaded, PROMPTS)
    again = options(engine="continuous", batch_size=2)
    assert generate(loaded.model, loaded.tokenizer, PROMPTS, again) == [as_text(loaded, ids) for ids in found]


def test_a_batch_for_which_memory_does_not_suffice_is_asked_in_halves(loaded: Loaded, monkeypatch: Any) -> None:
    real, sizes = type(loaded.model).generate, list[int]()

    def generate_few(model: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return real(model, *args, **kwargs)

    expected = generate(loaded.model, loaded.tokenizer, PROMPTS, options())
    monkeypatch.setattr(type(loaded.model), "generate", generate_few)
    assert generate(loaded.model, loaded.tokenizer, PROMPTS, options()) == expected
    assert sizes == [5, 2, 3, 1, 2]


def test_answers_come_in_the_order_of_the_prompts(loaded: Loaded) -> None:
    forward = generate(loaded.model, loaded.tokenizer, PROMPTS, options(batch_size=2))
    backward = generate(loaded.model, loaded.tokenizer, PROMPTS[::-1], options(batch_size=2))
    assert backward[::-1] == forward


def test_plain_text_prompts_are_asked_without_a_template(loaded: Loaded) -> None:
    prompts = ["2 + 2 =", "A much longer prompt, which is padded less than the other one"]
    assert prompt_ids(loaded.tokenizer, prompts[0]) == loaded.tokenizer("2 + 2 =")["input_ids"]
    expected = [as_text(loaded, ids) for ids in one_by_one(loaded, prompts)]
    assert generate(loaded.model, loaded.tokenizer, prompts, options()) == expected


def test_a_prompt_has_one_bos_at_most(loaded: Loaded) -> None:
    """A template that writes the BOS itself and a tokenizer that adds one to plain text."""
    from tokenizers import processors

    tokenizer = loaded.tokenizer
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    for prompt in (PROMPTS[0], "plain"):
        assert prompt_ids(tokenizer, prompt).count(tokenizer.bos_token_id) == 1


def test_an_answer_ends_at_the_end_of_turn_token(loaded: Loaded) -> None:
    free = one_by_one(loaded, PROMPTS)
    stop = free[0][4]
    loaded.model.generation_config.eos_token_id = [stop, loaded.tokenizer.eos_token_id]
    expected = [as_text(loaded, ids[: ids.index(stop) + 1] if stop in ids else ids) for ids in free]
    assert expected[0] != as_text(loaded, free[0])
    assert generate(loaded.model, loaded.tokenizer, PROMPTS, options()) == expected


def test_the_end_of_turn_token_is_known_to_the_loaded_model(tiny_model: Callable[..., Any], loaded: Loaded) -> None:
    eos = loaded.tokenizer.convert_tokens_to_ids(END)
    chosen = settings(tiny_model(), loaded.tokenizer, options())
    assert chosen.eos_token_id[0] == eos
    assert chosen.pad_token_id == loaded.tokenizer.pad_token_id


def test_left_padding_puts_every_prompt_at_the_right_edge() -> None:
    inputs = left_pad([[1, 2, 3], [4]], 9, torch.device("cpu"))
    assert inputs["input_ids"].tolist() == [[1, 2, 3], [9, 9, 4]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


# --- options ---------------------------------------------------------------------------------------------------------


def new_ids(loaded: Loaded, **fields: Any) -> list[list[int]]:
    """New token ids of all prompts, by way of what `generate` gives to the model."""
    taken: list[list[int]] = []
    real = loaded.model.generate

    def spy(**kwargs: Any) -> torch.Tensor:
        output: torch.Tensor = real(**kwargs)
        taken.extend(output[:, kwargs["input_ids"].shape[1] :].tolist())
        return output

    loaded.model.generate = spy
    generate(loaded.model, loaded.tokenizer, PROMPTS, options(**fields))
    loaded.model.generate = real
    return taken


def repeated(rows: Sequence[Sequence[int]], size: int) -> int:
    grams = [[tuple(row[i : i + size]) for i in range(len(row) - size + 1)] for row in rows]
    return sum(len(found) - len(set(found)) for found in grams)


def make_repetitive(loaded: Loaded) -> None:
    """With tied weights and quiet layers a model repeats its last token: the embedding speaks loudest."""
    with torch.no_grad():
        weight = loaded.model.get_input_embeddings().weight
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)) * 20)
        loaded.model.lm_head.weight = weight


def test_max_new_tokens_bounds_the_answer(loaded: Loaded) -> None:
    assert {len(row) for row in new_ids(loaded, max_new_tokens=3)} == {3}


def test_no_repeat_ngram_reaches_generation(loaded: Loaded) -> None:
    make_repetitive(loaded)
    assert repeated(new_ids(loaded), 2) > 0, "the model repeats nothing: a vain test"
    assert repeated(new_ids(loaded, no_repeat_ngram_size=2), 2) == 0


def test_the_repetition_penalty_reaches_generation(loaded: Loaded) -> None:
    make_repetitive(loaded)
    assert repeated(new_ids(loaded, repetition_penalty=1e9), 1) < repeated(new_ids(loaded), 1)


def test_sampling_options_reach_generation(loaded: Loaded) -> None:
    chosen = settings(
        loaded.model, loaded.tokenizer, options(do_sample=True, temperature=0.3, top_p=0.8, top_k=5, max_new_tokens=7)
    )
    assert (chosen.do_sample, chosen.temperature, chosen.top_p, chosen.top_k) == (True, 0.3, 0.8, 5)
    assert chosen.max_new_tokens == 7
    greedy = settings(loaded.model, loaded.tokenizer, options())
    assert greedy.do_sample is False


def test_sampling_samples_and_greedy_does_not(loaded: Loaded) -> None:
    torch.manual_seed(0)
    first, second = (new_ids(loaded, do_sample=True, temperature=5.0) for _ in range(2))
    assert first != second
    assert new_ids(loaded) == new_ids(loaded)
    torch.manual_seed(0)
    assert new_ids(loaded, do_sample=True, temperature=5.0) == first


def test_the_likeliest_token_only_is_greedy(loaded: Loaded) -> None:
    assert new_ids(loaded, do_sample=True, top_k=1) == new_ids(loaded)
    assert new_ids(loaded, do_sample=True, top_p=1e-9) == new_ids(loaded)


def test_settings_that_come_with_the_model_do_not_leak_in(loaded: Loaded) -> None:
    """Chat models ship a generation_config with sampling and a repetition penalty; the config's word holds."""
    expected = new_ids(loaded)
    shipped = loaded.model.generation_config
    shipped.repetition_penalty, shipped.do_sample, shipped.temperature, shipped.top_k = 5.0, True, 0.7, 20
    assert new_ids(loaded) == expected
    torch.manual_seed(0)
    open_to_all = new_ids(loaded, do_sample=True, temperature=50.0)
    assert len({token for row in open_to_all for token in row}) > 25, "the model's own top_k is still in force"


@pytest.mark.parametrize("value", [True, False])
def test_enable_thinking_reaches_the_template(loaded: Loaded, value: bool) -> None:
    tokenizer = loaded.tokenizer
    tokenizer.chat_template = (
        "{{ messages[0].content }}{% if enable_thinking is defined %}[{{ enable_thinking }}]{% endif %}"
    )
    plain, told = prompt_ids(tokenizer, PROMPTS[0]), prompt_ids(tokenizer, PROMPTS[0], value)
    assert tokenizer.decode(plain) == "Hi"
    assert tokenizer.decode(told) == f"Hi[{value}]"
    seen: list[str] = []

    def spy(**kwargs: Any) -> torch.Tensor:
        seen.append(tokenizer.decode(kwargs["input_ids"][0]))
        return torch.cat([kwargs["input_ids"], kwargs["input_ids"][:, :1]], dim=1)

    loaded.model.generate = spy
    generate(loaded.model, tokenizer, PROMPTS[:1], options(enable_thinking=value))
    assert seen == [f"Hi[{value}]"]


# --- likelihood ------------------------------------------------------------------------------------------------------

LABELS = ("a", "billing", "refund", "maybe")


def from_scratch(loaded: Loaded, prompt: Any, label: str) -> float:
    """The mean log-probability of the label's tokens after the prompt, one full forward pass, nothing shared."""
    before = prompt_ids(loaded.tokenizer, prompt)
    ids = label_ids(loaded.tokenizer, prompt, label)
    logits = loaded.model(input_ids=torch.tensor([before + ids])).logits[0].float().log_softmax(-1)
    values = [logits[len(before) + index - 1, token] for index, token in enumerate(ids)]
    return float(torch.stack(values).mean())


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_likelihoods_are_those_of_each_label_from_scratch(loaded: Loaded, batch_size: int) -> None:
    sizes = [len(label_ids(loaded.tokenizer, PROMPTS[0], label)) for label in LABELS]
    assert sizes == [1, 2, 3, 4], "the labels are not of the lengths that the test is about"
    lengths = {len(prompt_ids(loaded.tokenizer, prompt)) for prompt in PROMPTS}
    assert len(lengths) > 3
    found = label_logprobs(loaded.model, loaded.tokenizer, PROMPTS, LABELS, batch_size)
    with torch.no_grad():
        for prompt, scores in zip(PROMPTS, found, strict=True):
            assert list(scores) == list(LABELS)
            for label, value in scores.items():
                assert value == pytest.approx(from_scratch(loaded, prompt, label), abs=1e-4), label
                assert value < -0.01, "a label is certain: a vain test"


def test_labels_of_one_token_only(loaded: Loaded) -> None:
    found = label_logprobs(loaded.model, loaded.tokenizer, PROMPTS, ("a", "b"), 2)
    with torch.no_grad():
        for prompt, scores in zip(PROMPTS, found, strict=True):
            for label, value in scores.items():
                assert value == pytest.approx(from_scratch(loaded, prompt, label), abs=1e-4)


def test_the_batch_size_changes_no_likelihood(loaded: Loaded) -> None:
    one, many = (label_logprobs(loaded.model, loaded.tokenizer, PROMPTS, LABELS, size) for size in (1, 5))
    for first, second in zip(one, many, strict=True):
        assert first == pytest.approx(second, abs=1e-4)


def test_a_labels_tokens_are_those_of_the_trained_answer(loaded: Loaded) -> None:
    text = f"<|im_start|>user\nHi{END}\n<|im_start|>assistant\n"
    for label in LABELS:
        whole = loaded.tokenizer(text + label)["input_ids"]
        assert label_ids(loaded.tokenizer, PROMPTS[0], label) == whole[len(prompt_ids(loaded.tokenizer, PROMPTS[0])) :]


def test_the_plain_templates_space_belongs_to_the_label(tiny_tokens: Callable[..., Any]) -> None:
    tokenizer = tiny_tokens(chat_template="plain").tokenizer
    for label in LABELS:
        assert tokenizer.decode(label_ids(tokenizer, PROMPTS[0], label)) == f" {label}"


def test_a_label_after_plain_text_follows_a_space(loaded: Loaded) -> None:
    for label in LABELS:
        assert loaded.tokenizer.decode(label_ids(loaded.tokenizer, "Category:", label)) == f" {label}"
        assert loaded.tokenizer.decode(label_ids(loaded.tokenizer, "Category:\n", label)) == label


@pytest.mark.parametrize("label", ["refund", "account", "a"])
def test_a_label_after_a_prompt_that_ends_in_a_space(loaded: Loaded, label: str) -> None:
    """The space and the word may be one token: the label must neither vanish nor lose its first letters."""
    ids = label_ids(loaded.tokenizer, "Category: ", label)
    assert loaded.tokenizer.decode(ids).strip() == label


def test_a_label_that_is_part_of_the_prompt_is_still_scored_at_its_end(loaded: Loaded) -> None:
    prompt = asked("refund or delivery? refund?")[0]
    assert loaded.tokenizer.decode(label_ids(loaded.tokenizer, prompt, "refund")) == "refund"


@pytest.mark.parametrize("label", ["", " ", "\u200b"])
def test_a_label_that_tokenises_to_nothing_is_refused(loaded: Loaded, label: str) -> None:
    from tokenizers import normalizers

    loaded.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    with pytest.raises(ConfigError, match=r"evaluate\.labels: .* tokenises to nothing"):
        label_logprobs(loaded.model, loaded.tokenizer, PROMPTS[:1], ["refund", label])


def test_thinking_is_off_for_the_labels_too_if_it_is_off_for_the_answers(
    loaded: Loaded, new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both scores must ask the same question."""
    from sft_dist.evaluate import likelihood

    seen: list[str] = []
    real = likelihood._score_batch

    def spy(model: Any, rows: Any, shared: Sequence[int], *rest: Any) -> torch.Tensor:
        seen.extend(loaded.tokenizer.decode(row[0].ids[:length]) for row, length in zip(rows, shared, strict=True))
        return real(model, rows, shared, *rest)

    monkeypatch.setattr(likelihood, "_score_batch", spy)
    loaded.tokenizer.chat_template += (
        "{% if add_generation_prompt and enable_thinking is false %}<think></think>{% endif %}"
    )
    run = new_run("evaluate.generation.enable_thinking=false", "evaluate.data.rows=2")
    evaluate_model(load_run_config(run.config), run, loaded, "before")
    assert len(seen) == 2
    assert all(text.endswith("<think></think>") for text in seen)


# --- scores ----------------------------------------------------------------------------------------------------------


def scored(category: str | None, right: bool, label: bool | None) -> dict[str, Any]:
    return {"kind": "scored", "category": category, "exact_match": right, "label_correct": label}


def test_scores_by_category() -> None:
    rows = [
        {"kind": "question", "prompt": [], "answer": "ignored"},
        scored("b", True, True),
        scored("b", False, True),
        scored("a", False, False),
        scored(None, True, True),
    ]
    assert summarise(rows) == {
        "exact_match": 0.5,
        "label_accuracy": 0.75,
        "by_category": {
            "a": {"n": 1, "exact_match": 0.0, "label_accuracy": 0.0},
            "b": {"n": 2, "exact_match": 0.5, "label_accuracy": 1.0},
        },
    }


def test_scores_without_labels_or_categories() -> None:
    assert summarise([scored(None, True, None)]) == {"exact_match": 1.0, "label_accuracy": None, "by_category": {}}
    assert summarise([]) == {"exact_match": None, "label_accuracy": None, "by_category": {}}


def test_exact_match_forgives_white_space_at_the_ends_only() -> None:
    assert exact_match(" refund\n", "refund ")
    assert not exact_match("Refund", "refund")
    assert not exact_match("re fund", "refund")
    assert not exact_match("refund.", "refund")


def test_evaluation_writes_answers_and_scores(loaded: Loaded, new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers are put into the model's mouth, so the scores can be told by hand."""
    from sft_dist.data.sources import load_examples

    run = new_run("evaluate.data.rows=6", "evaluate.system=Be brief.", "evaluate.questions=[Hello, Goodbye]")
    config = load_run_config(run.config)
    examples = load_examples(config.evaluate.data, system=None, on_bad_row="error")[0]
    expected = [example.fields["category"] for example in examples]
    asked_for: list[Any] = []

    def answer(model: Any, tokenizer: Any, prompts: Sequence[Any], options: Any, asked: Any) -> list[str]:
        asked_for.extend(prompts)
        return ["Hi!", "Bye!"] if len(prompts) == 2 else [f" {expected[0]}\n", *["wrong"] * 5]

    monkeypatch.setattr("sft_dist.evaluate.generate.generate", answer)
    evaluate_model(config, run, loaded, "before")
    part = read_json(run.scores)["before"]
    rows = read_jsonl(run.eval / "before.jsonl")
    assert [row["kind"] for row in rows] == ["question"] * 2 + ["scored"] * 6
    assert [row["answer"] for row in rows[:2]] == ["Hi!", "Bye!"]
    assert all(prompt[0] == {"role": "system", "content": "Be brief."} for prompt in asked_for)
    assert rows[0]["prompt"][-1] == {"role": "user", "content": "Hello"}
    for row, label in zip(rows[2:], expected, strict=True):
        assert row["category"] == row["expected"] == label
        assert row["predicted_label"] == max(row["label_logprobs"], key=row["label_logprobs"].get)
        assert row["label_correct"] is (row["predicted_label"] == label)
        assert set(row["label_logprobs"]) == set(config.evaluate.labels)
    assert [row["exact_match"] for row in rows[2:]] == [True, *[False] * 5]
    assert part == summarise(rows)
    assert part["exact_match"] == pytest.approx(1 / 6, abs=1e-6)
    assert part["by_category"][expected[0]]["exact_match"] > 0
    scores = read_json(run.scores)
    assert scores == {"before": part, "n": 6, "sets": scores["sets"]}
    assert list(scores["sets"]) == ["data"]
    assert scores["sets"]["data"]["scores"]["exact"]["before"] == part["exact_match"]
    assert scores["sets"]["data"]["scores"]["label"]["before"] == part["label_accuracy"]


def test_the_answer_is_not_in_the_question(loaded: Loaded, new_run: NewRun) -> None:
    run = new_run("evaluate.data={task: mix, rows: 10}", "evaluate.labels=[]", "evaluate.generation.max_new_tokens=1")
    config = load_run_config(run.config)
    evaluate_model(config, run, loaded, "before")
    for row in read_jsonl(run.eval / "before.jsonl"):
        assert row["prompt"][-1]["role"] == "user"
        assert row["expected"] not in row["prompt"][-1]["content"]
        assert row["label_logprobs"] is None
        assert row["predicted_label"] is None


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, session_environment: dict[str, str], tiny_model_dir: Path
) -> RunDir:
    """A finished run of the smoke recipe with two questions."""
    from sft_dist.config.loader import load_config
    from sft_dist.stages import new_run, run_here

    folder = tmp_path_factory.mktemp("finished")
    asking = ["evaluate.questions=[Hello, Goodbye]", "train.max_steps=2", "model.dtype=float32"]
    run = new_run(load_config("smoke", [f"run.dir={folder}", *asking]))
    run_here(run)
    return run


def test_scores_json_has_exactly_the_shape_of_the_contract(finished: RunDir) -> None:
    scores = read_json(finished.scores)
    assert set(scores) == {"before", "after", "n", "sets"}
    assert scores["n"] == 6
    (found,) = scores["sets"].values()
    assert set(found) == {"n", "first", "scores", "by_category", "gains", "losses"}
    assert (found["n"], found["first"], set(found["scores"])) == (6, "exact", {"exact", "label"})
    for part in (found["scores"], *(inside["scores"] for inside in found["by_category"].values())):
        assert part["exact"]["before"] is not None
        assert part["exact"]["test"] == "mcnemar"
    for when in ("before", "after"):
        assert set(scores[when]) == {"exact_match", "label_accuracy", "by_category"}
        assert scores[when] == summarise(read_jsonl(finished.eval / f"{when}.jsonl"))
        for shares in scores[when]["by_category"].values():
            assert set(shares) == {"n", "exact_match", "label_accuracy"}
        assert sum(shares["n"] for shares in scores[when]["by_category"].values()) == 6


def test_before_and_after_ask_the_same(finished: RunDir) -> None:
    before, after = (read_jsonl(finished.eval / f"{when}.jsonl") for when in ("before", "after"))
    for key in ("kind", "prompt", "expected", "category"):
        assert [row.get(key) for row in before] == [row.get(key) for row in after]
    logprobs = [[row["label_logprobs"] for row in rows if row["kind"] == "scored"] for rows in (before, after)]
    assert logprobs[0] != logprobs[1], "the tuned model scores like the base model"


def test_after_is_the_published_model_and_before_the_base_model(finished: RunDir, tiny_model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for when, folder in (("before", tiny_model_dir), ("after", finished.model)):
        model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
        tokenizer = AutoTokenizer.from_pretrained(finished.model)
        (row, *_) = [row for row in read_jsonl(finished.eval / f"{when}.jsonl") if row["kind"] == "scored"]
        found = label_logprobs(model, tokenizer, [row["prompt"]], list(row["label_logprobs"]))[0]
        assert found == pytest.approx(row["label_logprobs"], abs=1e-4)


def test_evaluate_again_gives_the_same_scores(finished: RunDir, call_cli: Callable[..., int], capsys: Any) -> None:
    import json

    scores = read_json(finished.scores)
    for flags in ((), ("--before",)):
        assert call_cli("evaluate", finished.path, "--json", *flags) == 0
        assert json.loads(capsys.readouterr().out) == scores
    assert finished.read_status()["state"] == "done"


def test_evaluate_shows_each_set_with_both_models(finished: RunDir, call_cli: Callable[..., int], capsys: Any) -> None:
    assert call_cli("evaluate", finished.path) == 0
    shown = capsys.readouterr().out
    assert "Set data" in shown
    assert "likeliest label right" in shown


def test_evaluate_without_a_final_model_is_exit_5(new_run: NewRun, call_cli: Callable[..., int], capsys: Any) -> None:
    run = new_run()
    assert call_cli("evaluate", run.path) == 5
    assert f"sft-dist resume {run.path}" in capsys.readouterr().err
    with pytest.raises(CheckpointError):
        compare.load_for(load_run_config(run.config), run, None, "after")  # type: ignore[arg-type]


def test_chat_keeps_the_conversation_until_it_is_reset(finished: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from sft_dist.evaluate import chat as chatting
    from sft_dist.parallel.machine import this_machine
    from sft_dist.parallel.resolve import resolve

    config = load_run_config(finished.config)
    loaded = compare.load_for(config, finished, resolve(config, this_machine()), "after")
    seen: list[str] = []
    real = loaded.model.generate

    def spy(**kwargs: Any) -> torch.Tensor:
        seen.append(loaded.tokenizer.decode(kwargs["input_ids"][0]))
        assert kwargs.pop("streamer") is None
        return real(**kwargs)

    loaded.model.generate = spy
    lines = iter(["first", "", "second", "/reset", "third", "/help", "/exit", "never"])
    notes: list[str] = []
    chatting.chat(config, loaded, lambda: next(lines), None, notes.append)
    assert notes == [chatting.HELP]
    assert len(seen) == 3
    assert seen[0] == f"<|im_start|>user\nfirst{END}\n<|im_start|>assistant\n"
    assert seen[1].startswith(seen[0])
    assert seen[1].endswith(f"user\nsecond{END}\n<|im_start|>assistant\n")
    assert seen[2] == seen[0].replace("first", "third")
    assert next(lines) == "never"


def test_labels_of_a_tokenizer_that_is_written_in_python(
    tiny_tokens: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no offsets; its labels begin at the same tokens as if it had."""
    from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

    tokenizer, prompt = tiny_tokens().tokenizer, [{"role": "user", "content": "Which one, \u9000?"}]
    asked = [
        (given, label)
        for given in (prompt, "Which one:")
        for label in ("yes", "yes, please", "Gr\u00fc\u00dfe", "\u9000\u6b3e")
    ]
    expected = [candidate(tokenizer, given, label) for given, label in asked]
    template = tokenizer.chat_template
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", property(lambda self: False))
    assert [candidate(tokenizer, given, label) for given, label in asked] == expected
    by_bytes = ByT5Tokenizer()
    by_bytes.chat_template = template
    found = candidate(by_bytes, prompt, "Gr\u00fc\u00dfe")
    assert by_bytes.decode(found.ids[found.first :]) == "Gr\u00fc\u00dfe"
    with pytest.raises(ConfigError, match="tokenises to nothing"):
        candidate(by_bytes, prompt, " ")


def test_a_plain_prompt_is_asked_without_the_end_that_some_tokenizers_write(tiny_tokens: Callable[..., Any]) -> None:
    from tokenizers import processors

    tokenizer = tiny_tokens().tokenizer
    bare, answered = prompt_ids(tokenizer, "Which one:"), candidate(tokenizer, "Which one:", "yes")
    begin, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", END))
    for template in (f"<|im_start|> $A {END}", f"$A {END}", f"$A {END} {END}", "<|im_start|> $A"):
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<|im_start|>", begin), (END, end)]
        )
        opening = [begin] * template.startswith("<")
        assert prompt_ids(tokenizer, "Which one:") == [*opening, *bare]
        found = candidate(tokenizer, "Which one:", "yes")
        assert (found.ids, found.first) == ([*opening, *answered.ids], len(opening) + answered.first)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_chat_takes_text_of_another_encoding_from_a_pipe(
    finished: RunDir, monkeypatch: pytest.MonkeyPatch, call_cli: Callable[..., int], errors: str
) -> None:
    piped = io.TextIOWrapper(io.BytesIO(b"gr\xfc\xdfe\n/exit\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr(sys, "stdin", piped)
    assert call_cli("chat", finished.path) == 0


def test_a_run_that_has_not_kept_its_held_out_rows_reads_them_from_their_source(
    loaded: Loaded, new_run: NewRun
) -> None:
    """`python -m sft_dist.train CONFIG` makes such a run; scoring it later must not score nothing."""
    run = new_run("evaluate.data.rows=3", "evaluate.generation.max_new_tokens=1")
    kept = run.held_out.read_text(encoding="utf-8")
    run.held_out.unlink()
    evaluate_model(load_run_config(run.config), run, loaded, "before")
    assert read_json(run.scores)["n"] == 3
    assert run.held_out.read_text(encoding="utf-8") == kept
