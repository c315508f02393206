"""What the tasks of a job tell each other: lines in one file of the run directory, which all nodes see.

One file that exists before the job starts, appended to in place and opened anew for each look: of all ways over a network
file system the one that shows a change soonest, since a client asks the server when it opens a file but not when it looks
for one that was not there a moment ago.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_dist.jobs.place import Place


@dataclass(frozen=True)
class Board:
    """The words of one start of a job; those of earlier starts are passed over."""

    path: Path
    key: str
    task: int

    def say(self, word: str, **facts: Any) -> None:
        """Add a line: `train`, `end` (by task 0), `failed`, `left` (by the others)."""
        line = json.dumps({"key": self.key, "task": self.task, "word": word, **facts}) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as stream:
            stream.write(line.encode())
            stream.flush()
            os.fsync(stream.fileno())

    def said(self, word: str) -> list[dict[str, Any]]:
        """The lines with this word, oldest first."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except OSError:  # not there yet, or a server that restarts
            return []
        found = []
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and entry.get("key") == self.key and entry.get("word") == word:
                    found.append(entry)
        return found


def board_file(run: Path) -> Path:
    return run / "slurm" / "board.jsonl"


def board_of(place: Place) -> Board:
    return Board(board_file(Path(place.run)), place.key, place.task)
