"""Cluster profiles: what a cluster's users would write into every config's `slurm`, in a file of its own."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from sft_dist.config.layers import Layer
from sft_dist.config.spelling import did_you_mean, shown
from sft_dist.config.yaml12 import read_yaml


def profile_layer(layers: Sequence[Layer], problems: list[str]) -> Layer | None:
    """The fields of the profile that the last of `layers` to name one names; below what the layers set themselves.

    Lines about a profile that is missing or no mapping are added to `problems`.
    """
    parts = [layer.tree.get("slurm") for layer in layers]
    named = [part["profile"] for part in parts if isinstance(part, dict) and "profile" in part]
    if not named or not isinstance(named[-1], str):
        return None
    name = named[-1]
    path = _find(name, problems)
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"slurm.profile   {path} cannot be read: {error}")
        return None
    tree, key_problems = read_yaml(text, str(path))
    problems += key_problems
    if not isinstance(tree, dict) or "slurm" in tree or "profile" in tree:
        problems.append(f"slurm.profile   {path} must hold fields of the section slurm, such as `partition: NAME`")
        return None
    return Layer(f"file {path}", {"slurm": tree})


def profile_folders() -> tuple[Path, ...]:
    """Where profiles are looked for, first found first taken."""
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return (Path("slurm"), Path(), Path(home).expanduser() / "sft-dist" / "profiles")


def _find(name: str, problems: list[str]) -> Path | None:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}", name) is None:
        problems.append(f"slurm.profile   {shown(name)} is not a name; it is a file's, without folder and .yaml")
        return None
    folders = profile_folders()
    found = [path for folder in folders if (path := folder / f"{name}.yaml").is_file()]
    if found:
        return found[0]
    known = {path.stem for folder in (folders[0], folders[2]) for path in folder.glob("*.yaml")}
    places = " or ".join(str(folder / f"{name}.yaml") for folder in folders)
    problems.append(f"slurm.profile   there is no {places}{did_you_mean(name, known)}")
    return None
