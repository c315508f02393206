"""How long `sft-dist status` takes for many runs, with an squeue and an sacct that answer at once and are counted.

    python benchmarks/status.py            # 100 runs
    python benchmarks/status.py 1000

Each run has 20 attempts and a metrics.jsonl of 20,000 rows (2.6 MB); a quarter each is running, queued, stopped and done.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPEATS = 5
ROWS = "".join(
    json.dumps({"time": "2026-11-22T10:00:00+00:00", "step": step, "loss": 2.5, "grad_norm": 1.25, "learning_rate": 2e-5, "tokens": 9}) + "\n"
    for step in range(20_000)
)  # fmt: skip


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        env = {**os.environ, "SFT_DIST_RUNS": str(folder / "runs"), "PATH": f"{folder}/bin:{os.environ['PATH']}"}
        make(folder, count)
        seconds = []
        for _ in range(REPEATS):
            started = time.monotonic()
            done = subprocess.run([sys.executable, "-m", "sft_dist", "status"], env=env, capture_output=True, text=True)
            seconds.append(time.monotonic() - started)
            assert done.returncode == 0 and len(done.stdout.splitlines()) > count, done.stderr
        calls = (folder / "calls").read_text(encoding="utf-8").split()
    each = {name: calls.count(name) / REPEATS for name in ("squeue", "sacct")}
    print(
        f"{count} runs: {statistics.median(seconds):.2f} s (lowest {min(seconds):.2f}, highest {max(seconds):.2f}), calls {each}"
    )


def make(folder: Path, count: int) -> None:
    jobs = []
    for number in range(count):
        run = folder / "runs" / f"run-{number:04d}"
        (run / "slurm").mkdir(parents=True)
        state = ("running", "queued", "stopped", "done")[number % 4]
        (run / "config.yaml").write_text("run: {}\n", encoding="utf-8")
        status = {
            "state": state,
            "step": 19_999,
            "max_steps": 40_000,
            "attempt": 21,
            "updated": "2026-11-22T10:00:00+00:00",
        }
        (run / "status.json").write_text(json.dumps(status), encoding="utf-8")
        (run / "slurm" / "job.json").write_text(
            json.dumps({"jobs": [{"job_id": str(1000 + number), "nodes": 2, "gpus_per_node": 8}]}), encoding="utf-8"
        )
        line = {"start": "2026-11-22T08:00:00+00:00", "end": "2026-11-22T09:00:00+00:00", "job_id": str(1000 + number)}
        (run / "attempts.jsonl").write_text((json.dumps(line) + "\n") * 20, encoding="utf-8")
        (run / "metrics.jsonl").write_text(ROWS, encoding="utf-8")
        if number % 8 < 4:  # the jobs of the others are gone, so sacct is asked too
            jobs.append(
                f"{1000 + number}|{'PENDING' if state == 'queued' else 'RUNNING'}|2026-11-22T09:00:00|N/A|2|None"
            )
    (folder / "bin").mkdir()
    for name, text in (("squeue", "\n".join(jobs)), ("sacct", "")):
        program = folder / "bin" / name
        program.write_text(f"#!/bin/sh\necho {name} >> {folder}/calls\ncat <<'E'\n{text}\nE\n", encoding="utf-8")
        program.chmod(0o755)


if __name__ == "__main__":
    main()
