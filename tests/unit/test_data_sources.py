"""Rows come from files, the Hub and tasks; what cannot be read says so on one screen."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import subprocess
import sys

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from sft_dist.config.schema import SourceConfig, SourcePart
from sft_dist.data.readers import file_rows
from sft_dist.data.sources import load_examples, task_rows, write_task
from sft_dist.errors import ConfigError, DataError


def row(answer="Hello!", **fields):
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}], **fields}


def lines(*rows):
    return "".join(json.dumps(r) + "\n" for r in rows)


def load(path, *, on_bad_row="error", system=None, **fields):
    return load_examples(SourceConfig(path=str(path), **fields), system=system, on_bad_row=on_bad_row)


def answers(examples):
    return [example.messages[-1]["content"] for example in examples]


@pytest.fixture
def rows_file(tmp_path):
    def write(content, name="rows.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_jsonl_with_blank_lines_and_line_numbers(rows_file):
    path = rows_file("\n" + lines(row("a")) + "  \n\n" + lines(row("b", id=2)))
    examples, dropped = load(path, system="Be kind.")
    assert answers(examples) == ["a", "b"]
    assert [e.where for e in examples] == [f"{path}:2", f"{path}:5"]
    assert examples[1].fields == {"id": 2}
    assert examples[0].messages[0] == {"role": "system", "content": "Be kind."}
    assert dropped == []


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + lines(row("a"), row("b")).encode(),
        lines(row("a"), row("b")).replace("\n", "\r\n").encode(),
        lines(row("a"), row("b")).rstrip("\n").encode(),
    ],
    ids=["bom", "crlf", "no newline at the end"],
)
def test_jsonl_variants(rows_file, content):
    assert answers(load(rows_file(content))[0]) == ["a", "b"]


def test_line_separators_inside_strings_do_not_split_lines(rows_file):
    text = "a\u2028b\x85c"
    content = json.dumps(row(text), ensure_ascii=False) + "\n" + json.dumps(row("x")) + "\n"
    assert answers(load(rows_file(content))[0]) == [text, "x"]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_json_array(rows_file, name, bom):
    path = rows_file(bom + json.dumps([row("a"), row("b")], indent=1).encode(), name)
    examples, _ = load(path)
    assert answers(examples) == ["a", "b"]
    assert examples[1].where == f"{path}: row 2"


def test_json_object_with_data_and_lines_in_a_json_file(rows_file):
    assert answers(load(rows_file(json.dumps({"version": 1, "data": [row("a")]}), "a.json"))[0]) == ["a"]
    path = rows_file(lines(row("a"), row("b")), "b.json")
    assert [e.where for e in load(path)[0]] == [f"{path}:1", f"{path}:2"]


def test_sample_takes_the_first_rows_and_does_not_look_at_the_rest(rows_file):
    path = rows_file(lines(row("a"), row("b")) + "not json\n")
    assert answers(load(path, sample=2)[0]) == ["a", "b"]
    assert answers(load(path, sample=1)[0]) == ["a"]


def test_home_folder_in_path(rows_file, tmp_path, monkeypatch):
    rows_file(lines(row("a")))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert answers(load("~/rows.jsonl")[0]) == ["a"]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "rows.jsonl", "rows.jsonl holds no rows"),
        ("", "rows.json", "rows.json holds no rows"),
        ("\ufeff\n \n", "rows.jsonl", "rows.jsonl holds no rows"),
        ("[]", "rows.json", "rows.json holds no rows"),
        ('{"data": []}', "rows.json", "rows.json holds no rows"),
        (json.dumps(row(), indent=1), "rows.json", 'holds one JSON object without a list "data"'),
        ('"text"', "rows.json", 'holds one JSON value without a list "data"'),
        ('[\n{"a": 1},\n{"b" 2}]', "rows.json", r"rows.json:3: not valid JSON: Expecting ':' delimiter at column 6"),
        (lines(row()).encode("utf-16"), "rows.jsonl", "rows.jsonl is UTF-16 text"),
        (lines(row()).encode("utf-16-le"), "rows.jsonl", "binary or UTF-16"),
        (lines(row()).encode("utf-16"), "rows.json", "rows.json is UTF-16 text"),
        (lines(row("a")).encode() + b'{"a": "caf\xe9"}\n', "rows.jsonl", r"rows.jsonl:2 is not UTF-8 text \(byte 0xe9 at position 11\)"),
        (b'["caf\xe9"]', "rows.json", r"rows.json is not UTF-8 text \(byte 0xe9"),
        ("a,b\n1,2\n", "rows.csv", r"rows.csv:2: the format cannot be told from its keys \(a, b\)"),
        ("prompt,completion\n", "rows.csv", "rows.csv holds no rows"),
        ('prompt,completion\na,"b\n', "rows.csv", r"rows.csv:2: not valid CSV: unexpected end of data"),
        ("prompt,completion,completion\na,b,c\n", "rows.csv", "rows.csv has 2 columns with the name 'completion'"),
        ("prompt\tx\tcompletion\tx\na\tb\tc\td\n", "rows.tsv", "rows.tsv has 2 columns with the name 'x'"),
        (b"prompt,completion\na,caf\xe9\n", "rows.csv", r"rows.csv \(after line 1\) is not UTF-8 text"),
        (
            gzip.compress(lines(row()).encode(), mtime=0),
            "rows.jsonl",
            r"rows.jsonl holds gzip, not text\n  add the ending .gz",
        ),
        (b"\x28\xb5\x2f\xfd\x04\x00", "rows.csv", r"rows.csv holds zstd, not text\n  add the ending .zst"),
        (b"PAR1\x15\x04", "rows.json", r"rows.json holds Parquet, not text\n  give it the ending .parquet"),
        (b"PK\x03\x04\x14\x00", "rows.xlsx", r"rows.xlsx holds a zip archive, not text\n  .* saved as CSV"),
        (lines(row()), "rows.csv", r"rows.csv holds JSON, not columns\n  give it the ending .jsonl"),
        ('{"a": "b', "rows.jsonl", r"rows.jsonl:1: not valid JSON: Unterminated string starting at column 7"),
        (b"no parquet", "rows.parquet", "rows.parquet is not valid Parquet"),
        (b"no arrow", "rows.arrow", "rows.arrow is not valid Arrow"),
        (b"no gzip", "rows.jsonl.gz", r"rows.jsonl.gz cannot be read: Not a gzipped file"),
        (gzip.compress(lines(row()).encode(), mtime=0)[:-9], "rows.jsonl.gz", r"rows.jsonl.gz cannot be read: "),
        (b"no zstd", "rows.jsonl.zst", "rows.jsonl.zst cannot be read: "),
        ("[" * 100_000, "rows.json", "not valid JSON"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("on_bad_row", ["error", "drop"])
def test_unusable_files(rows_file, content, name, message, on_bad_row):
    with pytest.raises(DataError, match=message) as caught:
        load(rows_file(content, name), on_bad_row=on_bad_row)
    assert caught.value.exit_code == 4
    assert caught.value.hint


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (lines(row("a")).encode() + b"\0" * 20 + b"\n" + lines(row("b")).encode(), "rows.jsonl", ":2: not valid JSON"),
        (b"question,answer\nq,a\nq,b\0\nq,b\n", "rows.csv", ":3: holds a NUL byte"),
    ],
)
def test_a_nul_byte_is_a_matter_of_its_row(rows_file, content, name, message):
    path = rows_file(content, name)
    examples, dropped = load(path, on_bad_row="drop")
    assert answers(examples) == ["a", "b"]
    assert len(dropped) == 1
    assert dropped[0].startswith(f"{path}{message}")


ASKED = '"messages": [{"role": "user", "content": "Hi"}]'
ANSWERED = '"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "last"}]'
WITH_A_KEY_TWICE = {
    "column": (f"{{{ASKED}, {ANSWERED}}}", "messages"),
    "inside": ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "content"),
    "escaped": ('{"instruction": "a", "output": "b", "out\\u0070ut": "c"}', "output"),
}


@pytest.mark.parametrize(("twice", "key"), WITH_A_KEY_TWICE.values(), ids=WITH_A_KEY_TWICE)
@pytest.mark.parametrize(
    "form", ["{}\n{}\n{}\n", "[{}, {},\n{}]", '{{"more": {{"a": 1, "a": 2}}, "data": [{}, {}, {}]}}']
)
def test_a_key_twice_is_a_matter_of_its_row(rows_file, monkeypatch, twice, key, form):
    """Python takes the last of the two and says nothing."""
    from sft_dist.data import json_rows

    first, last = json.dumps(row("a")), json.dumps(row("b"))
    path = rows_file(form.format(first, twice, last), "rows.json")
    place = f"{path}:2" if form.startswith("{}") else f"{path}: row 2"
    for size in (3, 64, 2**20):
        monkeypatch.setattr(json_rows, "PIECE", size)
        examples, dropped = load(path, on_bad_row="drop")
        assert answers(examples) == ["a", "b"]
        assert dropped == [
            f"{place}: an object has the key {key!r} twice, and which of the two is meant cannot be told"
        ]


def test_a_key_twice_in_a_cell_that_holds_json_is_a_matter_of_its_row(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as stream:
        cells = csv.writer(stream)
        cells.writerow(["messages"])
        cells.writerows(
            [
                [json.dumps(row("a")["messages"]).replace('"content"', key + '"content"')]
                for key in ('"content": "", ', "")
            ]
        )
    examples, dropped = load(path, on_bad_row="drop")
    assert answers(examples) == ["a"]
    assert dropped == [f"{path}:2: an object has the key 'content' twice, and which of the two is meant cannot be told"]


def test_bad_rows_are_reported_together(rows_file):
    broken = ['{"messages": [', "[1]", '{"messages": []}', '"x"', "{}", "{'a': 1}", "null"]
    path = rows_file(lines(row()) + "\n".join(broken))
    with pytest.raises(DataError) as caught:
        load(path)
    message = caught.value.message
    assert message.startswith("7 of 8 rows cannot be used:")
    assert f"{path}:2: not valid JSON: Expecting value at column 15" in message
    assert f"{path}:3: the row is a list" in message
    assert f'{path}:6: has no "messages"' in message
    assert f"{path}:7" not in message and message.endswith("... and 2 more")
    assert "data.on_bad_row=drop" in caught.value.hint


def test_bad_rows_are_dropped_with_their_messages(rows_file):
    path = rows_file("oops\n" + lines(row("a"), {"messages": []}, row("b")))
    examples, dropped = load(path, on_bad_row="drop")
    assert answers(examples) == ["a", "b"]
    assert [d.split(": ")[0] for d in dropped] == [f"{path}:1", f"{path}:3"]


def test_all_rows_dropped_is_an_error(rows_file):
    with pytest.raises(DataError, match="all 2 rows were dropped") as caught:
        load(rows_file(lines({"messages": []}, {"messages": 3})), on_bad_row="drop")
    assert "on_bad_row=drop" not in str(caught.value)


def test_row_without_an_answer(rows_file):
    path = rows_file(lines({"messages": [{"role": "user", "content": "Hi"}]}))
    with pytest.raises(DataError, match="the only row cannot be used") as caught:
        load(path)
    assert f"{path}:1: has no assistant message" in caught.value.message
    assert "a right row: " in caught.value.hint


def test_undetectable_format_names_keys_and_formats(rows_file):
    path = rows_file(lines({"frage": "a", "antwort": "b"}))
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: the format cannot be told from its keys \(frage, antwort\)"
    ) as e:
        load(path)
    assert "prompt_completion" in e.value.hint and "instruction" in e.value.hint


def test_named_format_overrides_detection(rows_file):
    path = rows_file(lines({**row(), "instruction": "Say x", "output": "x"}))
    assert answers(load(path, format="instruction")[0]) == ["x"]
    assert answers(load(path)[0]) == ["Hello!"]


def test_missing_files(rows_file, tmp_path, monkeypatch):
    rows_file(lines(row()), "train_rows.jsonl")
    with pytest.raises(DataError, match="there is no file") as caught:
        load(tmp_path / "train_row.jsonl")
    assert caught.value.hint == f"did you mean {tmp_path / 'train_rows.jsonl'}?"
    with pytest.raises(DataError, match=r"data files in .*: train_rows\.jsonl"):
        load(tmp_path / "zzz.json")
    with pytest.raises(DataError, match=r"the folder .*nowhere does not exist"):
        load(tmp_path / "nowhere" / "rows.jsonl")
    (tmp_path / "sub").mkdir()
    with pytest.raises(DataError, match="there are no data files in"):
        load(tmp_path / "sub" / "rows.jsonl")
    with pytest.raises(DataError, match=r"sub holds no data files\n  known endings: \.json, \.jsonl"):
        load(tmp_path / "sub")
    with pytest.raises(DataError, match=r"\*\.csv matches no data files"):
        load(tmp_path / "*.csv")
    monkeypatch.chdir(tmp_path)
    for name in ("./rows", "../x/rows", "a/b/c", "my rows", "train_rows.json"):
        with pytest.raises(DataError, match="there is no file"):
            load(name)


def fake_hub(monkeypatch, result):
    import datasets

    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        if isinstance(result, Exception):
            raise result
        return datasets.Dataset.from_list(result)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_dataset(monkeypatch):
    calls = fake_hub(monkeypatch, [row("a", id=1), row("b", id=2), row("c", id=3)])
    examples, _ = load("owner/name", name="cfg", split="validation", revision="v1", sample=2)
    assert answers(examples) == ["a", "b"]
    assert examples[1].where == "owner/name (validation), row 2"
    assert examples[1].fields == {"id": 2}
    assert calls == [(("owner/name", "cfg"), {"split": "validation", "revision": "v1"})]


def test_hub_dataset_that_cannot_be_fetched(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gsm8k.jsonl").write_text("{}")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    fake_hub(monkeypatch, ConnectionError("no route to host\n" + "x" * 5000))
    with pytest.raises(DataError, match="could not be fetched from here") as caught:
        load("gsm8k", name="main")
    text = str(caught.value)
    assert "load_dataset('gsm8k', 'main', split='train', revision=None)" in text
    assert "ConnectionError: no route to host" in text
    assert "did you mean gsm8k.jsonl?" in text
    assert "pass a JSONL file" in text
    assert "is set" not in text
    assert len(text) < 1500
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set"):
        load("gsm8k")


def test_hub_dataset_without_rows(monkeypatch):
    fake_hub(monkeypatch, [])
    with pytest.raises(DataError, match="the dataset owner/name has no rows in split train"):
        load("owner/name")


def test_hub_really_offline(tmp_path):
    program = (
        "from sft_dist.config.schema import SourceConfig\n"
        "from sft_dist.data.sources import load_examples\n"
        "from sft_dist.errors import DataError\n"
        "try:\n    load_examples(SourceConfig(path='nobody/nothing-here'), system=None, on_bad_row='error')\n"
        "except DataError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True)
    assert "could not be fetched from here" in done.stdout
    assert "HF_HUB_OFFLINE is set" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_task_source_and_sample():
    source = SourceConfig(task="tickets", rows=12, seed=5, sample=7)
    examples, dropped = load_examples(source, system="Sort.", on_bad_row="error")
    assert (len(examples), dropped) == (7, [])
    assert examples[6].where == "task tickets, row 7"
    assert examples[0].first_trained == 2
    assert examples[0].fields["metric"] == "exact_match"
    mixed, _ = load_examples(SourceConfig(task="mix", rows=5), system=None, on_bad_row="error")
    assert len(mixed) == 5 and mixed[0].first_trained == 0


def test_write_task_writes_what_the_task_source_gives(tmp_path):
    path = write_task("mix", 30, 3, tmp_path / "new" / "mix.jsonl")
    from_file, _ = load(path)
    from_task, _ = load_examples(SourceConfig(task="mix", rows=30, seed=3), system=None, on_bad_row="error")
    assert [e.messages for e in from_file] == [e.messages for e in from_task]
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="already exists and was left as it is"):
        write_task("mix", 3, 3, path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["mix.jsonl"]


def test_unknown_task():
    with pytest.raises(ConfigError, match="there is no synthetic task 'ticket'; did you mean tickets"):
        task_rows("ticket", 3, 1)


# --- every kind of file ----------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
RECORDS = [row(f"answer {n}, \u6771\u4eac \U0001f389\n2", id=n) for n in range(5)]


def write_json(path, records):
    path.write_text(json.dumps(records, indent=2), encoding="utf-8")


def write_jsonl(path, records):
    path.write_text(lines(*records), encoding="utf-8")


def write_gz(path, records):
    path.write_bytes(gzip.compress(lines(*records).encode()))


def write_zst(path, records):
    path.write_bytes(pyarrow.compress(lines(*records).encode(), codec="zstd", asbytes=True))


def write_csv(path, records):
    with path.open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
        table.writerow(["messages", "id"])
        table.writerows([json.dumps(record["messages"]), record["id"]] for record in records)


def write_parquet(path, records):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=2)


def write_arrow_stream(path, records):
    table = pyarrow.Table.from_pylist(records)
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_arrow_file(path, records):
    table = pyarrow.Table.from_pylist(records)
    with pyarrow.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_saved(path, records):
    import datasets

    datasets.Dataset.from_list(records).save_to_disk(path)


WRITERS = {
    "rows.json": (write_json, ": row 3"),
    "rows.jsonl": (write_jsonl, ":3"),
    "rows.ndjson": (write_jsonl, ":3"),
    "rows.jsonl.gz": (write_gz, ":3"),
    "rows.jsonl.zst": (write_zst, ":3"),
    "rows.csv": (write_csv, ":4"),
    "rows.tsv": (write_csv, ":4"),
    "rows.parquet": (write_parquet, ": row 3"),
    "stream.arrow": (write_arrow_stream, ": row 3"),
    "file.arrow": (write_arrow_file, ": row 3"),
    "saved": (write_saved, ": row 3"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    write, third = WRITERS[name]
    path = tmp_path / name
    write(path, RECORDS)
    examples, dropped = load(path)
    assert answers(examples) == [record["messages"][1]["content"] for record in RECORDS]
    assert [str(example.fields["id"]) for example in examples] == [*"01234"]
    assert examples[2].where == f"{path}{third}"
    assert dropped == []


def tool(name, **properties):
    schema = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def calls_of(name, **arguments):
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
    asked = {"role": "assistant", "content": None, "tool_calls": calls}
    return [CHAT[0], asked, {"role": "tool", "name": name, "content": "42"}, {"role": "assistant", "content": "42"}]


CALLS = [
    {"messages": calls_of("weather", where={"city": "Rome"}), "tools": [tool("weather", city="string"), tool("now")]},
    {"messages": calls_of("add", numbers=[{"a": 1}, {"b": 2}]), "tools": [tool("add", a="number", b="number")]},
    {"messages": CHAT, "expected": "Hello!"},
]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "stream.arrow", "file.arrow", "saved"])
def test_the_calls_and_tools_of_a_table_are_those_of_the_same_rows_as_json(tmp_path, name):
    """A table gives each object the keys of all objects in its column; a model trained on that would learn them."""
    WRITERS[name][0](tmp_path / name, CALLS)
    weather, add, plain = load(tmp_path / name)[0]
    for example, row in ((weather, CALLS[0]), (add, CALLS[1])):
        assert list(example.tools) == row["tools"]
        assert example.messages[1]["tool_calls"] == row["messages"][1]["tool_calls"]
    assert plain.tools == ()
    assert list(plain.messages) == CHAT


def test_the_calls_of_a_hub_dataset_are_those_that_were_written(monkeypatch):
    fake_hub(monkeypatch, CALLS)
    weather = load("someone/calls")[0][0]
    assert list(weather.tools) == CALLS[0]["tools"]
    assert weather.messages[1]["tool_calls"] == CALLS[0]["messages"][1]["tool_calls"]


def test_separators_at_the_ends_of_lines_are_no_columns_of_one_name(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion,,\na,b,,\n")
    (example,) = load(tmp_path / "rows.csv")[0]
    assert (example.prompt, example.completion) == ("a", "b")


@pytest.mark.parametrize("name", ["rows.parquet", "file.arrow"])
def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path, name):
    table = pyarrow.Table.from_arrays([pyarrow.array([text]) for text in "qab"], ["prompt", "completion", "completion"])
    if name == "rows.parquet":
        pyarrow.parquet.write_table(table, tmp_path / name)
    else:
        with pyarrow.ipc.new_file(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(DataError, match=f"{name} has 2 columns with the name 'completion'"):
        load(tmp_path / name)


def test_a_csv_row_that_spans_lines_is_named_by_its_first(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"a\nb",c\nd,e,f\ng,h\n')
    examples, dropped = load(path, on_bad_row="drop")
    assert [(e.where, e.prompt) for e in examples] == [(f"{path}:2", "a\nb"), (f"{path}:5", "g")]
    assert dropped == [f"{path}:4: 3 cells under 2 columns"]


def test_saved_splits_are_chosen_by_name(tmp_path):
    import datasets

    parts = {name: datasets.Dataset.from_list([row(name)]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert answers(load(tmp_path / "saved")[0]) == ["train"]
    assert answers(load(tmp_path / "saved", split="test")[0]) == ["test"]
    with pytest.raises(DataError, match="has no split 'dev'\n  its splits: train, test"):
        load(tmp_path / "saved", split="dev")


def test_folders_and_patterns(tmp_path):
    (tmp_path / "rows" / "more").mkdir(parents=True)
    write_jsonl(tmp_path / "rows" / "b.jsonl", [row("b")])
    write_json(tmp_path / "rows" / "a.json", [row("a")])
    write_parquet(tmp_path / "rows" / "more" / "c.parquet", [row("c")])
    (tmp_path / "rows" / "README.md").write_text("no rows")
    (tmp_path / "rows" / ".hidden.jsonl").write_text("no rows")
    assert answers(load(tmp_path / "rows")[0]) == ["a", "b", "c"]
    assert answers(load(tmp_path / "rows" / "*.json*")[0]) == ["a", "b"]
    assert answers(load(tmp_path / "rows" / "**" / "*.parquet")[0]) == ["c"]
    assert load(tmp_path / "rows")[0][1].where == f"{tmp_path}/rows/b.jsonl:1"


def test_a_pattern_may_start_in_a_hidden_folder_or_above_this_one(tmp_path, monkeypatch):
    (tmp_path / ".mine" / "rows" / ".old").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_jsonl(tmp_path / ".mine" / "rows" / "a.jsonl", [row("a")])
    write_jsonl(tmp_path / ".mine" / "rows" / ".old" / "b.jsonl", [row("b")])
    for pattern in ("../.mine/rows/*.jsonl", f"{tmp_path}/.mine/**/*.jsonl", "../.mine/*/../rows/a*"):
        assert answers(load(pattern)[0]) == ["a"], pattern
    with pytest.raises(DataError, match=r"rows/\*.csv matches no data files"):
        load("../.mine/rows/*.csv")


def test_a_history_that_is_none_names_its_line_or_is_dropped(tmp_path):
    right = {"instruction": "a", "output": "b", "history": [["q", "a"]]}
    write_jsonl(tmp_path / "a.jsonl", [right, {**right, "history": 5}, {**right, "history": True}])
    with pytest.raises(DataError, match=r"a\.jsonl:2: history is a number.*\n.*a\.jsonl:3: history is true or false"):
        load(tmp_path / "a.jsonl")
    examples, dropped = load(tmp_path / "a.jsonl", on_bad_row="drop")
    assert (len(examples), len(dropped)) == (1, 2)


def test_names_of_columns_that_the_rows_format_lacks_are_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [row("a")])
    with pytest.raises(
        DataError, match=r"a\.jsonl: fields names prompt: the format messages does not have such a column"
    ):
        load(tmp_path / "a.jsonl", fields={"prompt": "frage"})


def test_a_folder_with_another_trainers_dataset_info_is_a_folder_of_files(tmp_path):
    """LLaMA-Factory lists its data sets in a file that has the name of one that `save_to_disk` leaves."""
    info = tmp_path / "dataset_info.json"
    info.write_text(json.dumps({"mine": {"file_name": "rows.json"}}))
    write_json(tmp_path / "rows.json", [row("a")])
    write_jsonl(tmp_path / "state.jsonl", [row("b")])
    assert answers(load(tmp_path)[0]) == ["a", "b"]
    assert answers(load(tmp_path / "*.json")[0]) == ["a"]


def test_a_folder_above_saved_datasets_holds_their_rows(tmp_path):
    write_saved(tmp_path / "all" / "one", [row("a")])
    write_saved(tmp_path / "all" / "two", [row("b")])
    assert answers(load(tmp_path / "all")[0]) == ["a", "b"]
    (tmp_path / "all" / "three").mkdir()
    write_json(tmp_path / "all" / "three" / "state.json", [row("c")])
    assert answers(load(tmp_path / "all")[0]) == ["a", "c", "b"], "a file of that name in another folder is data"


def test_sources_are_mixed_with_weights_and_caps(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [row(f"a{n}") for n in range(4)])
    write_csv(tmp_path / "b.csv", [row(f"b{n}", id=n) for n in range(4)])
    parts = (
        SourcePart(path=str(tmp_path / "a.jsonl"), weight=0.5),
        SourcePart(path=str(tmp_path / "b.csv"), sample=2, weight=2.0),
        SourcePart(task="mix", rows=3),
    )
    examples, _ = load_examples(SourceConfig(sources=parts), system=None, on_bad_row="error")
    assert answers(examples)[:6] == ["a1", "a3", "b0", "b0", "b1", "b1"]
    assert len(examples) == 9
    assert len(load(tmp_path / "a.jsonl", weight=1.5)[0]) == 6


def test_bad_rows_of_several_sources_are_reported_together(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [row("a"), {"messages": []}])
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": "x", "completion": ""}])
    parts = tuple(SourcePart(path=str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl"))
    with pytest.raises(
        DataError,
        match=r"2 of 3 rows cannot be used:\n.*a\.jsonl:2: messages is an empty list\n.*b\.jsonl:1: completion is empty",
    ):
        load_examples(SourceConfig(sources=parts), system=None, on_bad_row="error")


def test_an_array_is_read_piece_by_piece(tmp_path, monkeypatch):
    """Items that cross the borders of pieces, and what follows the array, are read right at every size of a piece."""
    from sft_dist.data import json_rows

    records = [row("\u6771\u4eac]},[" * n, id=1234567890) for n in range(6)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n  \n", encoding="utf-8")
    for size in (1, 2, 3, 7, 64):
        monkeypatch.setattr(json_rows, "PIECE", size)
        read = [found.record for found in file_rows(path, "rows.json")]
        assert read == records
    for text in ("[1, 2", "[1 2]", "[1, ]", "[,1]"):
        path.write_text(text)
        with pytest.raises(DataError, match="not valid JSON"):
            list(file_rows(path, "rows.json"))


DATA_OBJECTS = [
    '{"data": %s}',
    '{"version": 1.5, "about": {"data": [1], "by": ["a]", "}"]},\n "data": %s, "more": null, "n": -12}\n\n',
    '\n \n{"data":\n%s\n}',
    "\ufeff%s",
]


@pytest.mark.parametrize("around", DATA_OBJECTS)
@pytest.mark.parametrize("indent", [None, 1])
def test_the_array_data_of_an_object_is_read_piece_by_piece(tmp_path, monkeypatch, around, indent):
    from sft_dist.data import json_rows

    records = [row("\u6771\u4eac]},[" * n, id=1234567890) for n in range(4)] + [12345]
    path = tmp_path / "rows.json"
    path.write_text(around % json.dumps(records, ensure_ascii=False, indent=indent), encoding="utf-8")
    monkeypatch.setattr(json_rows, "_whole_json_rows", None)
    for size in (1, 2, 3, 7, 64, 2**20):
        monkeypatch.setattr(json_rows, "PIECE", size)
        assert [found.record for found in file_rows(path, "rows.json")] == records
        assert [found.number for found in file_rows(path, "rows.json")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("size", [5, 64, 2**20])
@pytest.mark.parametrize("before", ["", "\ufeff", "\n  \n", "\ufeff\n"])
def test_lines_in_a_json_file_are_read_as_lines(tmp_path, monkeypatch, size, before):
    """A row of lines may have a column `data` as well, and the lines keep their numbers."""
    from sft_dist.data import json_rows

    monkeypatch.setattr(json_rows, "PIECE", size)
    monkeypatch.setattr(json_rows, "_whole_json_rows", None)
    path = tmp_path / "rows.json"
    path.write_text(f"{before}{lines(row('a', data=[1]), row('b'))}\n", encoding="utf-8")
    examples, _ = load(path)
    assert answers(examples) == ["a", "b"]
    assert [example.where for example in examples] == [f"{path}:{n + before.count(chr(10))}" for n in (1, 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data": [{}, {}], "more": }', "not valid JSON: Expecting value at column 28"),
        ('{"data": [{}, {}]', "not valid JSON: Expecting ',' delimiter"),
        ('{"data": [{} {}]}', "not valid JSON: Expecting ',' delimiter"),
        ('{\n"data": [{}]}\n{"data": [{}]}', "rows.json:3: not valid JSON: Extra data"),
        ("[{}]\n[{}]", "rows.json:2: not valid JSON: Extra data"),
        ('{"data": [{}], "data": [{}]}', 'rows.json holds "data" more than once'),
        ('{"data": {"a": [{}]}}', 'holds one JSON object without a list "data"'),
        ('{"rows": [{}]}', 'holds one JSON object without a list "data"'),
        ('{"data": [{}]}\xff', "rows.json is not UTF-8 text"),
        ('{"data": [{}], 5: 1}', "not valid JSON: Expecting property name"),
    ],
)
def test_what_is_wrong_behind_the_first_rows_of_an_object_is_said(tmp_path, monkeypatch, text, message):
    from sft_dist.data import json_rows

    path = tmp_path / "rows.json"
    path.write_bytes(text.encode("latin-1"))
    for size in (1, 3, 2**20):
        monkeypatch.setattr(json_rows, "PIECE", size)
        with pytest.raises(DataError, match=message):
            list(file_rows(path, "rows.json"))


def compressed(write):
    return lambda path, texts: path.write_bytes(gzip.compress(write(texts).encode(), compresslevel=1))


def plain(write):
    return lambda path, texts: path.write_text(write(texts))


LARGE = {
    "array.json": plain(lambda rows: "[" + ",\n".join(rows) + "]"),
    "one line.json": plain(lambda rows: "[" + ", ".join(rows) + "]"),
    "lines.json": plain("\n".join),
    "data.json": plain(lambda rows: '{"version": 1,\n"data": [' + ",\n".join(rows) + "]}"),
    "data in one line.json": plain(lambda rows: '{"data": [' + ", ".join(rows) + "]}"),
    "data in one line.json.gz": compressed(lambda rows: '{"data": [' + ", ".join(rows) + "]}"),
    "lines.json.gz": compressed("\n".join),
    "lines.jsonl": plain("\n".join),
}


@pytest.mark.parametrize("name", LARGE)
def test_memory_does_not_grow_with_a_json_file(tmp_path, name):
    import tracemalloc

    path = tmp_path / name
    LARGE[name](path, [json.dumps(row(f"{n:08}" * 1250)) for n in range(2_000)])
    tracemalloc.start()
    count = sum(1 for _ in file_rows(path, name))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2_000
    assert peak < 8 * 2**20, "of 21 MB, a few pieces of 1 MB"


def test_memory_does_not_grow_with_a_group_of_rows(tmp_path):
    """Parquet is often written with one group of rows for all; what Arrow holds at any time is a small part of it."""
    generator = random.Random(1)
    texts = [generator.randbytes(500).hex() for _ in range(15_000)]
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"prompt": texts, "completion": texts[::-1]})
    pyarrow.parquet.write_table(table, path, row_group_size=len(texts), use_dictionary=False)
    del table
    assert path.stat().st_size > 15 * 2**20
    before, held, count = pyarrow.total_allocated_bytes(), [], 0
    for count, _ in enumerate(file_rows(path, "rows.parquet"), 1):
        if count % 500 == 1:
            held.append(pyarrow.total_allocated_bytes() - before)
    assert count == 15_000
    assert max(held) < 10 * 2**20
