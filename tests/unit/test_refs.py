"""The generated files are what `make refs` writes today, and the reference has every field in plain words."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from pydantic import TypeAdapter

from sft_dist import refs
from sft_dist.config.explain import json_schema
from sft_dist.config.schema import Auto, Count, Fraction, Positive
from sft_dist.config.sft_fields import known_sft_fields
from sft_dist.config.spelling import all_fields

ROOT = Path(__file__).resolve().parents[2]
# Not while tests are collected: every xdist worker does that, and one of them runs these tests.
light = functools.cache(refs.light_files)


def test_the_generated_files_are_up_to_date():
    assert [name for name, text in light().items() if (ROOT / name).read_bytes() != text.encode()] == [], "make refs"


def test_generating_twice_gives_the_same_bytes():
    assert refs.light_files() == light()


def test_the_packaged_list_of_trl_fields_has_the_form_that_refs_writes():
    # Whether it has the right names is tested where trl may be imported.
    text = (ROOT / "sft_dist/resources/sft_config_fields.json").read_text("utf-8")
    assert text == json.dumps(sorted(known_sft_fields()), indent=2) + "\n"


def cells(markdown: str) -> dict[str, list[str]]:
    """The rows of all tables by their first cell, without its backticks."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in markdown.splitlines() if line.startswith("| `")]
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in rows}


def test_the_reference_has_every_field_once_with_type_default_and_meaning():
    rows = cells(light()["docs/config.md"])
    shared = ("data.train.", "data.eval.", "evaluate.data.")
    for field in all_fields():
        if "." in field:
            name = field.rpartition(".")[2] if field.startswith(shared) else field
            assert len(rows[name]) == 3, field
            assert all(rows[name]), field


def test_the_reference_says_what_a_field_takes():
    rows = cells(light()["docs/config.md"])
    assert rows["train.learning_rate"] == ["number, above 0", "`2e-05`", "Peak learning rate."]
    assert rows["model.dtype"][:2] == ["`auto`, `float32` or `bfloat16`", "`auto`"]
    assert rows["run.seed"][:2] == ["whole number, 0 or more, below 4294967296", "`42`"]
    assert rows["data.train"][:2] == ["text; or list; or mapping, see [Source](#source)", "`{task: tickets}`"]
    assert rows["evaluate.generation"][1] == "its own defaults"
    assert rows["evaluate.questions"][:2] == ["list of text", "`[]`"]


def test_every_section_has_its_own_heading_and_links_inside_the_reference_resolve():
    text = light()["docs/config.md"]
    headings = re.findall(r"^## (\S+)$", text, re.MULTILINE)
    sections = [field for field in all_fields() if "." not in field]
    assert headings[: len(sections)] == sections
    anchors = {heading.lower() for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (bool, "`true` or `false`"),
        (str | None, "text"),
        (Count | Auto, "whole number, 1 or more; or `auto`"),
        (Fraction, "number, 0 or more, at most 1"),
        (Positive | None, "number, above 0"),
        (tuple[Literal["a", "b"], ...], "list of `a` or `b`"),
        (dict[str, int], "mapping"),
    ],
)
def test_types_read_as_plain_words(annotation, words):
    assert refs.type_in_words(TypeAdapter(annotation).json_schema()) == words


def test_a_type_without_words_stops_the_generation():
    with pytest.raises(ValueError, match="no plain words"):
        refs.type_in_words({"type": "surprise"})


def test_a_bar_in_a_meaning_does_not_end_its_cell():
    field = {"type": "string", "default": "a|b", "description": "One | two\nlines."}
    schema = {
        "properties": {"part": {"$ref": "#/$defs/PartConfig"}},
        "$defs": {"PartConfig": {"description": "A part.", "properties": {"field": field}}},
    }
    assert cells(refs.config_reference(schema)) == {"part.field": ["text", r"`a\|b`", r"One \| two lines."]}


def test_write_files_writes_what_differs_and_leaves_the_rest(tmp_path):
    (tmp_path / "same.txt").write_text("same\n")
    before = (tmp_path / "same.txt").stat()
    refs.write_files(tmp_path, {"same.txt": "same\n", "new/other.txt": "other\n"})
    assert (tmp_path / "new/other.txt").read_text() == "other\n"
    assert (tmp_path / "same.txt").stat().st_ino == before.st_ino


def test_the_light_step_does_not_import_trl():
    code = (
        "import sys; from sft_dist import refs; refs.write_files = lambda root, files: None; refs.main(['--light']); "
        "sys.exit(int(any(name in sys.modules for name in ('trl', 'torch', 'transformers'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_schema_file_is_the_one_that_the_command_prints():
    assert json.loads(light()["docs/sft-dist.schema.json"]) == json_schema()


def test_outside_of_a_checkout_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(refs, "__file__", str(tmp_path / "site-packages" / "sft_dist" / "refs.py"))
    with pytest.raises(SystemExit, match="no checkout"):
        refs.main(["--light"])
    assert not list(tmp_path.iterdir())
