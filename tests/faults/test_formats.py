"""Files in every format and every kind of row are trained end to end, all sources in one run."""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from sft_dist.config.loader import load_run_config
from sft_dist.data.prepared import open_prepared, prepared_folder
from sft_dist.files import read_json, read_jsonl
from sft_dist.rundir import RunDir
from sft_dist.stages import run_here
from sft_dist.train.pretrained import cache_root
from sft_dist.train.tokenizer import load_tokenizer

NewRun = Callable[..., RunDir]
Rows = list[dict[str, Any]]

# ChatML with a place for what tool calls and reasoning models need.
TEMPLATE = """
{%- if tools %}{{ "<|im_start|>tools\\n" + (tools | tojson) + "<|im_end|>\\n" }}{% endif %}
{%- for message in messages %}
{{- "<|im_start|>" + message.role + "\\n" }}
{%- if message.role == "assistant" %}{% generation %}
{%- if message.reasoning_content %}{{ "<think>" + message.reasoning_content + "</think>" }}{% endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}
{{- "<|im_end|>" }}{% endgeneration %}{{ "\\n" }}
{%- else %}{{ message.content + "<|im_end|>\\n" }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}
"""


def lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_json(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")


def as_jsonl(path: Path, rows: Rows) -> None:
    path.write_bytes(lines(rows))


def as_gzip(path: Path, rows: Rows) -> None:
    path.write_bytes(gzip.compress(lines(rows)))


def as_zstd(path: Path, rows: Rows) -> None:
    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write(lines(rows))


def as_csv(path: Path, rows: Rows) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(
            {key: it if isinstance(it, str) else json.dumps(it) for key, it in row.items()} for row in rows
        )


def as_parquet(path: Path, rows: Rows) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def as_saved(path: Path, rows: Rows) -> None:
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(str(path))


def says(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(city: str) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}]


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
# name of the source -> how it is written, its name on the disk, its rows for a word, the format found, fields of the source.
# Each row holds its word in what is trained.
KINDS: dict[str, tuple[Callable[[Path, Rows], None], str, Callable[[str], dict[str, Any]], str, dict[str, Any]]] = {
    "messages": (as_jsonl, "a.jsonl", lambda w: {"messages": [says("system", "Be kind."), says("user", "Hi"), says("assistant", w)]}, "messages", {}),
    "parts": (as_json, "b.json", lambda w: {"messages": [says("user", [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]), says("assistant", [{"type": "text", "text": w}])]}, "messages", {}),
    "tools": (as_gzip, "c.jsonl.gz", lambda w: {"tools": TOOLS, "messages": [says("user", "Weather?"), says("assistant", None, tool_calls=call(w)), says("tool", "sunny"), says("assistant", "It is sunny.")]}, "messages", {}),
    "tools-in-a-table": (as_parquet, "d.parquet", lambda w: {"tools": json.dumps(TOOLS), "messages": [says("user", "Weather?", tool_calls=None), says("assistant", "", tool_calls=call(w)), says("tool", "sunny", tool_calls=None), says("assistant", "Fine.", tool_calls=None)]}, "messages", {}),
    "weights": (as_jsonl, "e.jsonl", lambda w: {"messages": [says("user", "A?"), says("assistant", w, weight=0.5), says("user", "B?"), says("assistant", "b", train=False), says("user", "C?"), says("assistant", "c")]}, "messages", {}),
    "reasoning": (as_zstd, "f.jsonl.zst", lambda w: {"messages": [says("user", "2 + 2?"), says("assistant", "4", reasoning_content=w)]}, "messages", {}),
    "sharegpt": (as_json, "g.json", lambda w: {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": w}], "system": "Be kind."}, "sharegpt", {}),
    "sharegpt-tools": (as_jsonl, "h.jsonl", lambda w: {"conversations": [{"from": "human", "value": "Weather?"}, {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": {"city": w}})}, {"from": "observation", "value": "sunny"}, {"from": "gpt", "value": "Fine."}]}, "sharegpt", {}),
    "alpaca": (as_json, "i.json", lambda w: {"instruction": "Translate", "input": "Guten Tag", "output": w, "history": [["Hi", "Hello!"]]}, "instruction", {}),
    "instruction-response": (as_csv, "j.csv", lambda w: {"instruction": "Say it,\n\"please\"", "response": w}, "instruction", {}),
    "prompt-completion": (as_csv, "k.csv", lambda w: {"prompt": "2 + 2 =", "completion": f" {w}"}, "prompt_completion", {}),
    "prompt-completion-chat": (as_parquet, "l.parquet", lambda w: {"prompt": [says("user", "Hi")], "completion": [says("assistant", w)]}, "prompt_completion", {}),
    "question-answer": (as_saved, "m", lambda w: {"question": "2 + 2?", "answer": w}, "question_answer", {}),
    "text": (as_gzip, "n.jsonl.gz", lambda w: {"text": f"Once upon a time, {w}."}, "text", {}),
    "mapped": (as_parquet, "o.parquet", lambda w: {"frage": "Wie?", "antwort": w}, "question_answer", {"fields": {"question": "frage", "answer": "antwort"}}),
    "renamed": (as_jsonl, "p.jsonl", lambda w: {"dialog": [{"speaker": "client", "words": "Hi"}, {"speaker": "agent", "words": w}]}, "messages", {"fields": {"messages": "dialog", "role": "speaker", "content": "words"}, "roles": {"client": "user", "agent": "assistant"}}),
}  # fmt: skip
PER_SOURCE = 2


def words_of(name: str) -> list[str]:
    """What the rows of a source say, which no other one does; in Chinese as well."""
    return [f"so {name.replace('-', ' ')} {number} \u4f60\u597d" for number in range(PER_SOURCE)]


@pytest.mark.parametrize("packing", [False, True], ids=["single", "packed"])
def test_every_kind_of_row_in_every_format_is_trained(new_run: NewRun, tmp_path: Path, packing: bool) -> None:
    (tmp_path / "tools.jinja").write_text(TEMPLATE, encoding="utf-8")
    sources = []
    for name, (write, file, row, _, fields) in KINDS.items():
        write(tmp_path / file, [row(word) for word in words_of(name)])
        sources.append({"path": str(tmp_path / file), **fields})
    run = new_run(
        f"data.train={json.dumps(sources)}",
        f"model.chat_template={tmp_path / 'tools.jinja'}",
        f"data.packing={str(packing).lower()}",
        "data.max_length=256",
        "data.eval_size=0",
        "train={num_train_epochs: 1, max_steps: null, global_batch_size: 4, per_device_train_batch_size: 2, eval_strategy: no}",
        "evaluate={before: false, after: false, labels: [], data: null}",
    )
    run_here(run)
    assert run.read_status()["state"] == "done"
    ledger = read_json(run.ledger)["train"]
    count = PER_SOURCE * len(KINDS)
    assert (ledger["rows_in"], ledger.get("documents", ledger["rows"])) == (count, count)
    assert (ledger["dropped_reasons"], ledger["truncated_rows"], ledger["weighted_rows"]) == ({}, 0, PER_SOURCE)
    found = [(one["format"], one["rows_in"], one["documents"]) for one in ledger["sources"]]
    assert found == [(kind[3], PER_SOURCE, PER_SOURCE) for kind in KINDS.values()]
    logged = [row for row in read_jsonl(run.metrics) if "loss" in row]
    assert len(logged) == math.ceil(ledger["rows"] / 4) and all(math.isfinite(row["loss"]) for row in logged)
    assert logged[-1]["tokens"] == ledger["tokens"]
    tokenizer = load_tokenizer(load_run_config(run.config).model).tokenizer
    prepared = open_prepared(prepared_folder(cache_root(), read_json(run.ledger)["key"]))
    assert prepared is not None
    said = "\n".join(tokenizer.decode([it for it in labels if it != -100]) for labels in prepared.train["labels"])
    missing = [word for name in KINDS for word in words_of(name) if said.count(word) != 1]
    assert not missing
