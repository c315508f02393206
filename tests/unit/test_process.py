"""How our processes start and end. Each case in an interpreter of its own: `begin` changes how Python works."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from sft_dist.errors import DataError
from sft_dist.process import status_of

IMPORTING = """
import atexit, gc, sys
atexit.register(lambda: print("frozen at the end:", gc.get_freeze_count() > 1000))  # the last one to be called
from sft_dist import process
usual = gc.get_threshold()
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", IMPORTING + code], capture_output=True, text=True, check=True)
    return done.stdout


def test_what_was_imported_is_never_looked_at_for_garbage() -> None:
    said = python("""
process.begin()
collections = [generation["collections"] for generation in gc.get_stats()]
import asyncio, email.message, http.server, unittest.mock, xml.dom.minidom
made = [[] for _ in range(100_000)]
print("rarely:", [generation["collections"] for generation in gc.get_stats()] == collections)
process.libraries_are_in()
frozen = gc.get_freeze_count()
print("as usual:", gc.get_threshold() == usual, frozen > 100_000, len(gc.get_objects()) < 100)
more = [[] for _ in range(100_000)]
print("again:", gc.get_stats()[0]["collections"] > collections[0])
process.libraries_are_in()
print("once:", gc.get_freeze_count() <= frozen)  # there may be a model by now
""")
    assert said.splitlines() == [
        "rarely: True",
        "as usual: True True True",
        "again: True",
        "once: True",
        "frozen at the end: True",
    ]


def test_a_package_that_is_left_out_is_as_if_it_were_not_installed() -> None:
    said = python("""
from importlib.util import find_spec
import json
process.begin()
process.leave_out(["wave", "json"])
print(find_spec("wave"), find_spec("json") is not None)  # what is there stays
try:
    import wave
except ImportError as error:
    print(type(error).__name__)
""")
    assert said.splitlines() == ["None True", "ModuleNotFoundError", "frozen at the end: True"]


def test_a_process_of_someone_elses_stays_as_it_is() -> None:
    said = python("""
process.leave_out(["wave"])
process.libraries_are_in()
import wave
print(gc.get_threshold() == usual, gc.get_freeze_count())
""")
    assert said.splitlines() == ["True 0", "frozen at the end: False"]


def test_expected_errors_are_explained_and_give_the_status(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise DataError("row 3 has no answer", hint="add one")

    assert status_of(lambda: None) == 0
    assert status_of(fail) == 4
    assert capsys.readouterr().err == "error: row 3 has no answer\n  add one\n"
    with pytest.raises(ZeroDivisionError):
        status_of(lambda: 1 / 0)


TO_END = """
import atexit, os, signal, sys, threading
from sft_dist.process import run_to_end

class Late:
    def __del__(self, abort=os.abort):
        abort()

late = Late()  # goes when the interpreter does
meeting = threading.Event()

def finish():
    meeting.wait()
    print("a thread")

def main():
    atexit.register(print, "a handler")
    threading.Thread(target=finish).start()
    atexit.register(print, "the last handler")
    meeting.set()
    END

run_to_end(main)
"""


@pytest.mark.parametrize(("end", "status"), [("return 75", 75), ("return 0", 0), ("1 / 0", 1)])
def test_a_process_ends_without_taking_the_interpreter_down(end: str, status: int) -> None:
    """Threads and handlers are waited for, and nothing after them can end it in another way."""
    code = TO_END.replace("END", end)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    assert done.stdout.splitlines() == ["a thread", "the last handler", "a handler"]
    assert ("ZeroDivisionError" in done.stderr) == (status == 1)


def test_an_interrupt_that_nobody_caught_ends_the_process_as_always() -> None:
    code = TO_END.replace("END", "os.kill(os.getpid(), signal.SIGINT)").replace("late = Late()", "")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGINT
