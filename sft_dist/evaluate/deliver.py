"""A run's final model, proven once more, elsewhere: in another folder, or in a repository on the Hub."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from pathlib import Path

from sft_dist.errors import CheckpointError, ConfigError, DiskError
from sft_dist.evaluate.for_the_hub import stage
from sft_dist.evaluate.prove import proven, verdict
from sft_dist.files import publish_dir
from sft_dist.rundir import RunDir

log = logging.getLogger(__name__)
HUB = "hub:"
PLACES = f"--to FOLDER, or --to {HUB}OWNER/NAME"
# Weights of an earlier upload: beside the new ones they would be loaded, or counted, as well.
WEIGHTS = (".safetensors", ".safetensors.index.json")
LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"


def deliver(run: RunDir, to: str, *, public: bool = False) -> str:
    """Bring the run's final model to the folder `to`, or, for `hub:OWNER/NAME`, to the Hub; returns its path or address.

    It is compared with what was trained before, and what has arrived after: a copy by a fresh process, an upload by the
    hashes that the Hub gives. A new repository is private unless `public`. Raises CheckpointError if the model is missing or
    not what was trained, or if something else has arrived; ConfigError for a folder that exists, or no place at all.
    """
    target = None if to.startswith(HUB) else _target(run, to)
    if target is None:
        _check_repository(to.removeprefix(HUB))
    elif public:
        raise ConfigError(
            "--public is for repositories on the Hub, and --to names a folder", hint="--to hub:OWNER/NAME"
        )
    found = verdict(run)
    if found is None:
        raise CheckpointError(
            f"run {run.name} has no final model", hint=f"its training must end first: sft-dist resume {run.quoted}"
        )
    if "unproven" in found:
        raise CheckpointError(
            f"the model in {run.model} cannot be proven: {found['unproven']}", hint="copy it yourself"
        )
    if found["problem"]:
        raise CheckpointError(f"the model in {run.model} is damaged, and stays where it is: {found['problem']}")
    if target is None:
        with tempfile.TemporaryDirectory(prefix="sft-dist-") as scratch:
            stage(run.model, Path(scratch))
            return _upload(run, Path(scratch), to.removeprefix(HUB), public=public)
    return str(_copy(run.model, target))


def _target(run: RunDir, to: str) -> Path:
    """The folder that `to` names, where a copy can be. Raises ConfigError if it cannot."""
    shown = to if len(to) <= 100 else f"{to[:100]}..."
    if not to.strip():
        raise ConfigError("--to is empty", hint=PLACES)
    if re.match(r"hub:|[a-z][a-z0-9+.-]*:/", to, re.IGNORECASE):
        raise ConfigError(
            f"--to is {shown!r}, and sft-dist writes to folders and to Hugging Face's Hub only",
            hint=f"{PLACES}; bring a folder elsewhere with that place's own program",
        )
    try:
        target = Path(to).expanduser().absolute()
        inside = target.resolve().is_relative_to(run.model.resolve())
        exists = target.exists()
        there = next(path for path in target.parents if path.exists())
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, a loop of links, a NUL
        raise ConfigError(
            f"--to is {shown!r}, which is no folder: {getattr(error, 'strerror', None) or error}", hint=PLACES
        ) from None
    if inside:
        raise ConfigError(
            f"{target} is in the run's own model folder, of which it would be a copy",
            hint="name a folder outside of it",
        )
    if exists:
        raise ConfigError(f"{target} exists already and is not overwritten", hint="name a folder that is not there yet")
    if not there.is_dir():
        raise ConfigError(f"{target} cannot be a folder: {there} is a file", hint="name another folder")
    return target


def _check_repository(name: str) -> None:
    """Raise ConfigError for what can be no repository's name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    if not name.strip():
        raise ConfigError(f"--to {HUB} names no repository", hint=f"--to {HUB}OWNER/NAME")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"--to {HUB}{name}: {error}", hint=f"--to {HUB}OWNER/NAME") from None


def _copy(model: Path, target: Path) -> Path:
    need = sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
    there = next(path for path in target.parents if path.exists())
    free = shutil.disk_usage(there).free
    if free < need:
        raise DiskError(
            f"the model has {need / 1e9:.1f} GB, and {there} has {free / 1e9:.1f} GB free", hint="name another folder"
        )
    with publish_dir(target) as staged:
        shutil.copytree(model, staged, dirs_exist_ok=True)
        found = proven(staged)
        if found["problem"]:
            raise CheckpointError(f"the copy is not what was trained, and is removed: {found['problem']}")
    return target


def _upload(run: RunDir, folder: Path, name: str, *, public: bool) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError

    if HF_HUB_OFFLINE:
        raise ConfigError("HF_HUB_OFFLINE is set, so nothing can be uploaded", hint="unset it where there is a network")
    api = HfApi()
    try:
        address = api.create_repo(name, private=not public, exist_ok=True)
        there = api.model_info(address.repo_id)
        if not there.private and not public:
            raise ConfigError(
                f"{address} is there and public, and --public was not said", hint="say it, or name another repository"
            )
        commit = api.upload_folder(
            repo_id=address.repo_id,
            folder_path=folder,
            commit_message=f"run {run.name}, step {run.read_status().get('step')}",
            delete_patterns=_replaced([file.rfilename for file in there.siblings or ()], folder),
        )
        arrived = api.verify_repo_checksums(address.repo_id, revision=commit.oid, local_dir=folder)
    except ConfigError:
        raise
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        hint = LOGIN if status in (401, 403) else "nothing counts as uploaded; try again"
        raise CheckpointError(f"the Hub refused {name}: {str(error).splitlines()[0]}", hint=hint) from None
    # No network, a proxy, a file that is gone: the client's own kinds, and those of what it stands on.
    except Exception as error:
        said = str(error).splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{name} was not uploaded: {said[0]}", hint="try again where there is a network"
        ) from error
    wrong = [f"{it['path']} is different" for it in arrived.mismatches]
    wrong += [f"{name} is missing" for name in arrived.extra_paths]
    if wrong:
        raise CheckpointError(
            f"what {address} holds is not what was uploaded: {'; '.join(wrong[:5])}", hint="try again"
        )
    return str(commit.repo_url)


def _replaced(there: list[str], folder: Path) -> list[str]:
    """The repository's weights, those of a model or an adapter as ours lie, that the folder has not."""
    mine = {path.relative_to(folder).parent.as_posix() for path in folder.rglob("*") if path.name.endswith(WEIGHTS)}
    places = mine | {"."}
    return [
        name
        for name in there
        if name.endswith(WEIGHTS) and Path(name).parent.as_posix() in places and not (folder / name).is_file()
    ]
