"""What docker/test-image.sh asks of runs, inside of the image: check_runs.py demo | check_runs.py same NAME"""

import json
import sys
from pathlib import Path


def rows(name: str, file: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in Path("runs", name, file).read_text(encoding="utf-8").splitlines()]


def demo() -> None:
    scores = json.loads(Path("runs/demo/scores.json").read_text(encoding="utf-8"))
    before, after, count = scores["before"]["exact_match"], scores["after"]["exact_match"], scores["n"]
    print(f"demo: exact match {before:.2f} -> {after:.2f} on {count} rows")
    if before > 0.2 or after < 0.95:
        sys.exit("the demo misses its bar")


def same(name: str) -> None:
    """The run was stopped in the middle, lost no step, and has the losses of the run that nobody stopped."""
    state = json.loads(Path("runs", name, "status.json").read_text(encoding="utf-8"))["state"]
    attempts = rows(name, "attempts.jsonl")
    for attempt in attempts:
        print(f"{name}: steps {attempt['first_step']} to {attempt['last_step']}, {attempt.get('decided', '')}")
    if state != "done" or len(attempts) < 2:
        sys.exit(f"{name} is {state} after {len(attempts)} attempts")
    if [attempt["first_step"] for attempt in attempts[1:]] != [attempt["last_step"] for attempt in attempts[:-1]]:
        sys.exit(f"{name} lost steps")
    whole, stopped = (
        [(row["step"], row["loss"]) for row in rows(it, "metrics.jsonl") if "loss" in row] for it in ("whole", name)
    )
    if whole != stopped:
        sys.exit(f"{name} has other losses than the run that was not stopped")
    print(f"{name}: all {len(whole)} losses are those of the run that was not stopped")


if __name__ == "__main__":
    demo() if sys.argv[1] == "demo" else same(sys.argv[2])
