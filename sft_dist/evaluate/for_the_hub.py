"""What of a proven model leaves for the Hub: no rows of the training, and no folders of this machine."""

from __future__ import annotations

from pathlib import Path

from sft_dist.export import ADAPTER, PROOF, file_hash, is_local, shown_name
from sft_dist.files import read_json, write_json

SETTINGS = f"{ADAPTER}/adapter_config.json"


def stage(model: Path, folder: Path) -> None:
    """Fill `folder` with links to the files of `model`, but a PROOF.json without the rows that it was compared on.

    These are token ids of real training or held-out rows, which anybody with the tokenizer reads. The name of a base model that
    is a folder goes, too; the hashes of what is changed are those of the change.
    """
    for path in sorted(model.rglob("*")):
        place = folder / path.relative_to(model)
        if path.is_file() and place != folder / PROOF:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path.resolve())
    proof = read_json(model / PROOF) or {}
    name = proof["base"]["name"]
    local = proof["base"].get("local", is_local(name))
    files = dict(proof["files"])
    settings = read_json(folder / SETTINGS)
    if settings is not None:
        (folder / SETTINGS).unlink()
        write_json(
            folder / SETTINGS, {**settings, "base_model_name_or_path": Path(name).name if local else shown_name(name)}
        )
        files[SETTINGS] = file_hash(folder / SETTINGS)
    base = {**proof["base"], "name": None if local else name}
    write_json(folder / PROOF, {**proof, "base": base, "files": files, "logits": None})
