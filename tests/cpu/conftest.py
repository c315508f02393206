"""What the tests that run real code on a CPU share: the tiny model's parts, runs in this process, signals at a step."""

from __future__ import annotations

import contextlib
import http.server
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest

from sft_dist.rundir import RunDir

NewRun = Callable[..., RunDir]
CallCli = Callable[..., int]
Server = TypeVar("Server", bound=http.server.ThreadingHTTPServer)


@pytest.fixture(autouse=True)
def no_handler_of_an_earlier_test() -> Iterator[None]:
    """The command line's log handler keeps the stderr of its process, which in tests is each test's own."""
    yield
    logging.getLogger("sft_dist").handlers.clear()


@pytest.fixture(autouse=True)
def no_foreign_log_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run sets this variable for its process if nobody has; the next test's run must not inherit it."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")


@pytest.fixture
def tiny_tokens(tiny_model_dir: Path) -> Callable[..., Any]:
    """`tiny_tokens(chat_template="plain")` loads the tiny tokenizer as a run does; returns its RunTokenizer."""
    from sft_dist.config.schema import ModelConfig
    from sft_dist.train.tokenizer import load_tokenizer

    return lambda **fields: load_tokenizer(ModelConfig(**{"name": str(tiny_model_dir), **fields}))


@pytest.fixture
def tiny_model(tiny_tokens: Callable[..., Any]) -> Callable[..., Any]:
    """`tiny_model(dtype="bfloat16")` loads the tiny model as a run does (default: float32, sdpa)."""
    from sft_dist.config.schema import ModelConfig
    from sft_dist.train.attention import register
    from sft_dist.train.model import load_model

    def load(dtype: str = "float32", attn_implementation: str = "sdpa") -> Any:
        register()
        spec = ModelConfig(name="embedded:tiny")
        return load_model(spec, tiny_tokens(), dtype=dtype, attn_implementation=attn_implementation)

    return load


@pytest.fixture
def new_run(tmp_path: Path, tiny_model_dir: Path) -> NewRun:
    """`new_run("train.max_steps=2", name="a")` creates a run of the smoke recipe with these overrides.

    With `proved=False` it is created although it cannot run, as if something had gone away since.
    """
    from sft_dist import stages
    from sft_dist.config.loader import load_config

    def create_one(*overrides: str, name: str = "run", proved: bool = True) -> RunDir:
        loaded = load_config("smoke", [f"run.name={name}", f"run.dir={tmp_path / 'runs'}", *overrides])
        with pytest.MonkeyPatch.context() as patch:
            if not proved:
                patch.setattr(stages, "prove_here", lambda config, run: [])
            return stages.new_run(loaded)

    return create_one


@pytest.fixture
def call_cli(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> CallCli:
    """`call_cli("train", "smoke")` runs the command in this process and returns its exit status."""
    from sft_dist.cli import main

    def call(*args: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["sft-dist", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    return call


class Serve(Protocol):
    def __call__(self, server: Server) -> Server: ...


@pytest.fixture
def serve() -> Iterator[Serve]:
    """`serve(server)` lets an HTTP server answer in a thread until the test ends; returns it."""
    with contextlib.ExitStack() as stack:

        def start(server: Server) -> Server:
            stack.enter_context(server)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            return server

        yield start


@pytest.fixture
def no_proxy() -> dict[str, str | None]:
    """For the environment of a command that talks to such a server: without the proxies of this machine."""
    return dict.fromkeys(("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"))


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`signal_at(3, SIGTERM)` sends this process the signals, once, as soon as step 3 stands in metrics.jsonl."""
    from sft_dist.train.progress import Progress

    shown = Progress.metrics
    pending: dict[int, tuple[signal.Signals, ...]] = {}

    def metrics(self: Progress, row: dict[str, Any]) -> None:
        shown(self, row)
        for number in pending.pop(row["step"], ()):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Progress, "metrics", metrics)
    yield lambda step, *signals: pending.update({step: signals})
    assert not pending, f"the run never came to step {sorted(pending)}"
