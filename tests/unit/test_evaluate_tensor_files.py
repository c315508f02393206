"""safetensors files read without torch: hashes as of the values in memory, and what is not finite."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xxhash

from sft_dist.evaluate.tensor_files import PIECE, headers, is_zero, read_tensors, strays

BAD = {
    "F32": np.array([1, np.nan, 2], dtype=np.float32),
    "F64": np.array([1, -np.inf], dtype=np.float64),
    "F16": np.array([np.inf], dtype=np.float16),
    "BF16": np.array([0x3F80, 0x7FC0], dtype=np.uint16),  # 1 and NaN
}
GOOD = {
    "F32": np.array([1, -3.4e38, 1e-45], dtype=np.float32),
    "F64": np.array([1.7e308], dtype=np.float64),
    "F16": np.array([65504, -1], dtype=np.float16),
    "BF16": np.array([0x3F80, 0x7F7F, 0xFF7F], dtype=np.uint16),  # 1 and the largest numbers of either sign
    "I64": np.array([-1, 2**62]),
}


def written(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    header, place = {}, 0
    for name, (dtype, values) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [place, place + values.nbytes]}
        place += values.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(v.tobytes() for _, v in tensors.values()))


def test_types_shapes_and_hashes_are_those_of_what_was_written(tmp_path: Path) -> None:
    # A byte in front, so that what follows begins at an odd place.
    written(tmp_path / "a.safetensors", {"odd": ("U8", np.zeros(1, np.uint8)), **{k: (k, v) for k, v in GOOD.items()}})
    long = np.arange(PIECE // 4 + 5, dtype=np.float32).reshape(1, -1)
    written(tmp_path / "b.safetensors", {"long": ("F32", long), "empty": ("F32", np.zeros((0, 3), np.float32))})
    found = read_tensors(tmp_path)
    assert set(found) == {"odd", *GOOD, "long", "empty"}
    for name, values in {**GOOD, "long": long}.items():
        assert found[name].hash == xxhash.xxh3_128(values.tobytes()).hexdigest()
        assert (found[name].shape, found[name].finite) == (values.shape, True)
    assert (found["empty"].shape, found["empty"].file, found["odd"].dtype) == ((0, 3), "b.safetensors", "U8")


@pytest.mark.parametrize("dtype", BAD)
def test_what_is_not_finite_is_seen(tmp_path: Path, dtype: str) -> None:
    written(tmp_path / "a.safetensors", {"odd": ("U8", np.zeros(1, np.uint8)), "bad": (dtype, BAD[dtype])})
    assert not read_tensors(tmp_path)["bad"].finite


def test_what_is_not_finite_is_seen_at_the_end_of_a_long_tensor(tmp_path: Path) -> None:
    long = np.zeros(PIECE // 4 + 5, dtype=np.float32)
    long[-1] = np.nan
    written(tmp_path / "a.safetensors", {"long": ("F32", long)})
    assert not read_tensors(tmp_path)["long"].finite


@pytest.mark.parametrize("content", [b"", b"abc", b"\x05" + bytes(7) + b"hello", bytes(7) + b"\x7f" + bytes(50)])
def test_a_file_that_is_no_safetensors_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("dtype", GOOD)
def test_zeros_of_either_sign_are_zeros_and_nothing_else_is(tmp_path: Path, dtype: str) -> None:
    zeros = np.zeros(PIECE // 8 + 5, GOOD[dtype].dtype)
    signed = -zeros if np.issubdtype(zeros.dtype, np.floating) else zeros
    late = zeros.copy()
    late[-1] = 1
    none = zeros[:0]
    values = {"zeros": zeros, "signed": signed, "late": late, "good": GOOD[dtype], "none": none}
    written(tmp_path / "a.safetensors", {name: (dtype, it) for name, it in values.items()})
    found = read_tensors(tmp_path)
    assert {name for name, tensor in found.items() if tensor.zero} == {"zeros", "signed"}
    places = headers(tmp_path)
    assert {name for name, (_, _, path) in places.items() if is_zero(name, path)} == {"zeros", "signed"}
    assert places["late"] == (dtype, late.shape, tmp_path / "a.safetensors")


def test_a_tensor_in_two_files_is_named_with_both(tmp_path: Path) -> None:
    for name in ("a", "b"):
        written(tmp_path / f"{name}.safetensors", {"twice": ("F32", np.ones(2, np.float32))})
    with pytest.raises(ValueError, match=r"twice is in a\.safetensors and in b\.safetensors"):
        read_tensors(tmp_path)


def test_only_the_file_or_its_shards_belong_there(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model-1.safetensors", "pytorch_model.bin", "training_args.bin"):
        (tmp_path / name).touch()
    assert strays(tmp_path, "model.safetensors") == ["model-1.safetensors", "pytorch_model.bin"]
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-1.safetensors"}}')
    assert strays(tmp_path, "model.safetensors") == ["model.safetensors", "pytorch_model.bin"]
