"""The rules of the house that a linter does not know: sizes, names, links, and how much the training path holds."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "sft_dist"
MODULES = sorted(PACKAGE.rglob("*.py"))

MAX_FILE_LINES = 250
MAX_FUNCTION_LINES = 60
# Files behind train/worker.py, by room ("" is the package itself): growth shows where it happens.
MAX_WORKER_FILES = {"": 4, "config": 17, "data": 8, "jobs": 3, "parallel": 25, "train": 38}
# Rooms that may use the heavy libraries at module level; everything else works on a login node.
HEAVY_ROOMS = {"data", "train", "evaluate"}
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(parsed(path)))


@functools.cache
def repository_files() -> tuple[Path, ...]:
    """Every file that is tracked or would be added; outside a git checkout, every file that is not hidden."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        found = [path for path in ROOT.rglob("*") if not any(p.startswith(".") for p in path.relative_to(ROOT).parts)]
    else:
        found = [ROOT / name for name in listed.split("\0") if name]
    return tuple(sorted(path for path in found if path.is_file()))


def readable(path: Path) -> str:
    """The file's text; empty for an image or another binary."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def test_the_gates_see_the_package() -> None:
    assert PACKAGE / "rundir.py" in MODULES
    assert ROOT / "pyproject.toml" in repository_files()


def violations(found_in: Callable[[Path], object]) -> dict[str, object]:
    """Module -> what `found_in` has found there, for those where it is not empty. One test a rule: a test costs 5 ms."""
    found = {str(path.relative_to(ROOT)): found_in(path) for path in MODULES}
    return {name: what for name, what in found.items() if what}


def test_a_file_fits_in_a_readers_head() -> None:
    def lines(path: Path) -> int:
        count = len(path.read_text(encoding="utf-8").splitlines())
        return count if count > MAX_FILE_LINES else 0

    assert violations(lines) == {}, f"more than {MAX_FILE_LINES} lines: split it by topic"


def function_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring."""
    total = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function) is None:
        return total
    docstring = function.body[0]
    return total - ((docstring.end_lineno or docstring.lineno) - docstring.lineno + 1)


def test_functions_are_short() -> None:
    def long(path: Path) -> list[str]:
        functions = [it for it in nodes(path) if isinstance(it, (ast.FunctionDef, ast.AsyncFunctionDef))]
        return [
            f"{f.name} (line {f.lineno}): {n} lines" for f in functions if (n := function_lines(f)) > MAX_FUNCTION_LINES
        ]

    assert violations(long) == {}, f"longer than {MAX_FUNCTION_LINES} lines without the docstring"


def test_every_module_says_what_it_is_for() -> None:
    assert violations(lambda path: not ast.get_docstring(parsed(path))) == {}, "no docstring"


def test_only_the_cli_prints() -> None:
    def prints(path: Path) -> list[int]:
        calls = [node for node in nodes(path) if isinstance(node, ast.Call)]
        return [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]

    assert set(violations(prints)) <= {"sft_dist/cli.py"}, "print: log it, or return it to cli.py"


def test_commands_to_type_name_runs_as_a_shell_takes_them() -> None:
    """A folder may have blanks."""
    typed = re.compile(r"sft-dist [^\n]*\{[^}\n]*\.path\}")
    assert not {path.name: found for path in MODULES if (found := typed.findall(path.read_text(encoding="utf-8")))}


def test_light_modules_raise_instead_of_asserting() -> None:
    def bare(path: Path) -> list[int]:
        if path.relative_to(PACKAGE).parts[0] in HEAVY_ROOMS:
            return []
        return [node.lineno for node in nodes(path) if isinstance(node, ast.Assert) and node.msg is None]

    assert violations(bare) == {}, "assert without a message: raise an error that says what is wrong"


def test_names_say_what_is_inside() -> None:
    vague = violations(lambda path: VAGUE_NAMES & set(path.relative_to(PACKAGE).with_suffix("").parts))
    assert vague == {}, "a name that names nothing: name the topic"


def test_open_work_has_an_issue_number() -> None:
    def untracked(path: Path) -> list[int]:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [n for n, line in enumerate(lines, 1) if re.search(r"\b(TODO|FIXME|XXX)\b(?!\(#\d+\))", line)]

    assert violations(untracked) == {}, "write TODO(#123), or do it now"


# --- the repository's texts ------------------------------------------------------------------------------------------

FENCED = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`[^`\n]+`")
# [text](target "title"), ![alt](target) and [label]: target
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)|^ {0,3}\[[^\]]+\]:\s*<?([^\s>]+)", re.MULTILINE)


def relative_links(text: str) -> Iterator[str]:
    """The targets of links that point into the repository, without their anchors."""
    for match in LINK.finditer(INLINE_CODE.sub("", FENCED.sub("", text))):
        target = (match[1] or match[2]).split("#")[0]
        if target and not re.match(r"[a-z][a-z0-9+.-]*:|//", target, re.IGNORECASE):
            yield target


def test_links_are_found_in_markdown() -> None:
    text = 'See [a](docs/a.md#part), ![b](<b.png> "B"), [c](https://example.com), [d](#here) and `[e](e.md)`.\n'
    text += "```\n[f](f.md)\n```\n[g]: g.md\n"
    assert list(relative_links(text)) == ["docs/a.md", "b.png", "g.md"]


def test_relative_links_in_markdown_resolve() -> None:
    broken = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in repository_files()
        if path.suffix == ".md"
        for target in relative_links(readable(path))
        if not ((ROOT if target.startswith("/") else path.parent) / target.lstrip("/")).exists()
    ]
    assert not broken, f"links to nothing: {broken}"


def test_every_extra_is_explained_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {extra for group in re.findall(r"\[([\w,-]+)\]|`([\w-]+)`", readme) for extra in ",".join(group).split(",")}
    unexplained = set(project["optional-dependencies"]) - named
    assert not unexplained, f"extras that README.md never names: {sorted(unexplained)}"


# Put together here so that this file does not hold what it forbids.
MACHINE_PATHS = re.compile(r"(?<![\w.~<}-])/(?:" + "|".join(("work", "root")) + r")(?![\w.-]*\w)")
REGISTRY_HOSTS = re.compile(
    "|".join(r"\.".join(host) for host in (("pypi", "org"), ("python" + "hosted", "org"), ("debian", "org")))
)


@pytest.mark.parametrize("pattern", [MACHINE_PATHS, REGISTRY_HOSTS], ids=["machine paths", "registry hosts"])
def test_no_file_names_the_machine_it_was_written_on(pattern: re.Pattern[str]) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in repository_files()
        for number, line in enumerate(readable(path).splitlines(), 1)
        if (match := pattern.search(line))
    ]
    assert not found, f"texts that only make sense on one machine: {found}"


def test_machine_paths_are_told_from_ordinary_text() -> None:
    forbidden = ["cd " + "/".join(("", "work", "main")), '"' + "/".join(("", "root")) + '"']
    allowed = [
        "framework/worker.py",
        "/workspace",
        "~/work",
        "</root>",
        "and/or /rootless",
        "/".join(("data", "work", "rows.jsonl")),
    ]
    assert all(MACHINE_PATHS.search(text) for text in forbidden)
    assert not any(MACHINE_PATHS.search(text) for text in allowed)


# --- how much one has to read ----------------------------------------------------------------------------------------


def module_file(name: str) -> Path | None:
    """The file of a first-party module by its dotted name, None if that is no module."""
    base = ROOT.joinpath(*name.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def imported_names(path: Path) -> Iterator[str]:
    """Dotted names under sft_dist that a file imports anywhere, also inside functions."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            anchor = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*anchor, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield whole if base.startswith("sft_dist") and module_file(whole) else base


def import_closure(path: Path) -> set[Path]:
    """The first-party files that a reader of `path` may have to open, `path` among them."""
    seen: set[Path] = set()
    waiting = [path]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        names = (name for name in imported_names(current) if name.split(".")[0] == "sft_dist")
        waiting += [found for name in names if (found := module_file(name))]
    return seen


def test_the_closure_follows_imports() -> None:
    closure = import_closure(PACKAGE / "rundir.py")
    assert closure == {PACKAGE / "rundir.py", PACKAGE / "files.py", PACKAGE / "errors.py"}


def test_the_training_path_stays_small() -> None:
    rooms: dict[str, list[str]] = {}
    for path in sorted(import_closure(PACKAGE / "train" / "worker.py")):
        room, _, name = str(path.relative_to(PACKAGE)).rpartition("/")
        rooms.setdefault(room, []).append(name)
    too_many = {room: names for room, names in rooms.items() if len(names) > MAX_WORKER_FILES.get(room, 0)}
    assert not too_many, f"more files than {MAX_WORKER_FILES} behind train/worker.py: {too_many}"
