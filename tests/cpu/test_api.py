"""What a notebook uses: `import sft_dist`, and everything that it offers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import sft_dist
from sft_dist.errors import CheckpointError, ConfigError

ASK_ALL = ("evaluate.questions=[Hello there]", "train.max_steps=3")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path):
    root = tmp_path_factory.mktemp("runs")
    config = sft_dist.load_config(
        "smoke", [f"model.name={tiny_model_dir}", f"run.dir={root}", "run.name=api", *ASK_ALL]
    )
    return config, sft_dist.fine_tune(config)


def test_answers_come_as_they_were_asked_for(tiny_model_dir: Path) -> None:
    base = sft_dist.load(str(tiny_model_dir))
    one = sft_dist.ask(base, "Hello", max_new_tokens=4)
    many = sft_dist.ask(base, ["Hello", "and you?"], max_new_tokens=4)
    talk = sft_dist.ask(base, [{"role": "user", "content": "Hello"}], max_new_tokens=4)
    assert isinstance(one, str) and isinstance(many, list)
    assert many[0] == one == talk, "a text is asked as a user's message"
    assert len(many) == 2


def test_paths_runs_and_lines_are_taken_as_a_notebook_has_them(trained, tiny_model_dir: Path) -> None:
    _, run = trained
    assert sft_dist.load(tiny_model_dir).model.config.vocab_size == sft_dist.load(run).model.config.vocab_size
    assert sft_dist.load(str(run.path)).config == sft_dist.load(run.path).config == sft_dist.load(run).config
    assert sft_dist.compare(run.path) == sft_dist.compare(run)
    again = sft_dist.load_config(run.config, "train.max_steps=4").config
    assert (again.train.max_steps, again.model.name) == (4, str(tiny_model_dir))
    base = sft_dist.load(tiny_model_dir)
    assert len(sft_dist.ask(base, (word for word in ("one", "two")), max_new_tokens=1)) == 2


def test_what_cannot_be_is_a_sentence(tiny_model_dir: Path) -> None:
    for name in ("embedded:nope", None):
        with pytest.raises(ConfigError, match=r"model\.name"):
            sft_dist.load(name)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no config file"):
        sft_dist.load_config(Path("nope.yaml"))
    config = sft_dist.load_config("smoke", [f"model.name={tiny_model_dir}"])
    for asked in ({"row": 0}, {"row": -1}, {"row": 65}, {"rows": -1}):
        with pytest.raises(ConfigError, match=r"--row"):
            sft_dist.preview(config, **asked)
    with pytest.raises(ConfigError, match="a list of messages"):
        sft_dist.ask(sft_dist.load(tiny_model_dir), {"role": "user", "content": "Hi"})  # type: ignore[arg-type]


def test_what_is_not_said_of_generation_stays_as_the_config_has_it(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft_dist.evaluate import generate

    asked = []
    monkeypatch.setattr(generate, "generate", lambda *words: asked.append(words[3]) or [""])
    config = sft_dist.load_config("smoke", [f"model.name={tiny_model_dir}", "evaluate.generation.max_new_tokens=5"])
    base = sft_dist.load(config)
    sft_dist.ask(base, "Hello", repetition_penalty=1.5)
    sft_dist.ask(base, "Hello")
    assert [(it.max_new_tokens, it.repetition_penalty) for it in asked] == [(5, 1.5), (5, 1.0)]
    with pytest.raises(ConfigError, match="has no max_tokens"):
        sft_dist.ask(base, "Hello", max_tokens=3)
    with pytest.raises(ConfigError, match=r"max_new_tokens: .*greater than or equal to 1, and 0 was given"):
        sft_dist.ask(base, "Hello", max_new_tokens=0)


def test_a_run_that_is_trained_here_is_one_of_the_commands(trained, capsys: pytest.CaptureFixture[str]) -> None:
    config, run = trained
    assert run.read_status()["state"] == "done"
    assert run.report.is_file()
    scores = sft_dist.compare(run)
    assert scores["after"]["exact_match"] is not None
    assert sft_dist.compare(str(run.path)) == scores
    assert "Hello there" in capsys.readouterr().out
    tuned, base = sft_dist.load(run), sft_dist.load(config)
    assert any(not a.equal(b) for a, b in zip(tuned.model.parameters(), base.model.parameters(), strict=True))
    with pytest.raises(ConfigError, match="exists"):
        sft_dist.fine_tune(config)


def test_rows_and_tokens_are_shown(trained, capsys: pytest.CaptureFixture[str]) -> None:
    sft_dist.preview(trained[0], rows=2, row=2)
    shown = capsys.readouterr().out
    assert "2 of 64 rows" in shown
    assert "row 2" in shown and "trained" in shown


def test_a_run_without_a_model_says_how_to_get_one(trained, tmp_path: Path) -> None:
    from sft_dist.rundir import RunDir

    unfinished = RunDir(tmp_path / "unfinished")
    unfinished.path.mkdir()
    unfinished.config.write_text(trained[1].config.read_text())
    with pytest.raises(CheckpointError, match="no final model"):
        sft_dist.load(unfinished)
    with pytest.raises(ConfigError, match="was asked nothing"):
        sft_dist.compare(unfinished)


def test_importing_the_package_loads_nothing() -> None:
    code = "import sys, sft_dist; assert not {'torch', 'pydantic', 'sft_dist.api'} & set(sys.modules); print(dir(sft_dist))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(sft_dist.__all__) <= set(eval(done.stdout))


def test_what_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'fine_tuned'"):
        _ = sft_dist.fine_tuned
