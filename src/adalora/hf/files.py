"""The two files of an adapter: read with clear errors, written whole or not at all."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..core.errors import ConfigError
from .checked import check_settings, check_tensors

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
PICKLED = "adapter_model.bin"  # what PEFT wrote before 0.6
_LARGEST_SETTINGS = 2**24  # bytes: the pattern of a hundred thousand modules
_UNREADABLE = (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError, MemoryError)
# In the metadata of the weights, as JSON:
PRUNED = "adalora_pruned"  # modules of rank 0, which have no tensors, and their shapes
SCORES = "adalora_scores"  # importance of each triplet at the last allocation


def read_settings(directory: Path) -> dict[str, Any]:
    """``adapter_config.json`` of an adapter's folder.

    Raises:
        ConfigError: there is no such folder or file, or it is not one of PEFT's.
    """
    file = directory / ADAPTER_FILES[1]
    if not directory.is_dir():
        raise ConfigError(f"there is no folder {directory}.")
    if not file.is_file():
        raise ConfigError(f"{directory} is not the folder of an adapter: there is no {file.name} in it.")
    if file.stat().st_size > _LARGEST_SETTINGS:
        raise ConfigError(f"{file} is too large ({file.stat().st_size:,} bytes) to be a configuration of PEFT.")
    try:
        settings = read_json(file.read_text(encoding="utf-8"), str(file))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not JSON: {error}.") from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{file} is not a configuration of PEFT: it holds a {type(settings).__name__}, no keys.")
    check_settings(settings, file)
    return settings


def read_json(text: str, source: str) -> Any:
    """``text`` as JSON; ConfigError where it is none, is nested too deeply, or has a number of too many digits."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is not JSON: {error}.") from error


def read_tensors(directory: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of an adapter's folder on the CPU, and the file's metadata. A pickle may hold tensors alone.

    Raises:
        ConfigError: there are no weights, or they cannot be read.
    """
    file, pickled = directory / ADAPTER_FILES[0], directory / PICKLED
    if file.is_file():
        try:
            with safe_open(file, framework="pt") as opened:
                found, about = {name: opened.get_tensor(name) for name in list(opened.keys())}, opened.metadata() or {}
        except _UNREADABLE as error:
            raise ConfigError(f"{file} cannot be read: {_reason(error)}. Was its writing interrupted?") from error
        check_tensors(found, file)
        return found, about
    if not pickled.is_file():
        raise ConfigError(f"{directory} has neither {file.name} nor {pickled.name}.")
    _check_not_compressed(pickled)
    try:
        tensors = torch.load(pickled, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{pickled} holds more than tensors, which could run as code when it is read, so it is not read."
            " Get the adapter as safetensors, or from someone you trust."
        ) from error
    except Exception as error:  # whatever a broken pickle makes torch stumble over
        raise ConfigError(f"{pickled} cannot be read: {_reason(error)}. Was its writing interrupted?") from error
    check_tensors(tensors if isinstance(tensors, dict) else {"": None}, pickled)
    return tensors, {}


def _check_not_compressed(file: Path) -> None:
    """ConfigError for an archive that would grow when it is read; torch writes none."""
    if not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise ConfigError(f"{file} cannot be read: {_reason(error)}. Was its writing interrupted?") from error
    if packed:
        raise ConfigError(f"{file} is compressed, as torch.save never does, and is not read.")


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


def save_tensors(tensors: Mapping[str, Tensor], directory: Path, about: Mapping[str, Any]) -> None:
    """Write ``adapter_model.safetensors``; ``about`` (what is not empty of it) goes into its metadata as JSON."""
    written = save(
        {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()},
        metadata={"format": "pt"} | {key: json.dumps(value, sort_keys=True) for key, value in about.items() if value},
    )
    (directory / ADAPTER_FILES[0]).write_bytes(_with_sorted_metadata(written))


def _with_sorted_metadata(written: bytes) -> bytes:
    """Equal adapters are equal files: safetensors writes several entries of metadata in a random order.

    The format: length of the header (8 bytes, little endian), the header as JSON, padded with spaces to a multiple of
    8, the tensors.
    """
    size = int.from_bytes(written[:8], "little")
    header = json.loads(written[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + written[8 + size :]


@contextmanager
def replacing(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write files to; on leaving, they take their places in ``directory`` with ordinary permissions. After
    an error nothing there has changed."""
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file: give the name of a folder.")
    made = not target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".export-", dir=target))
    except OSError as error:
        raise ConfigError(_unwritten(target, error)) from error
    try:
        yield beside
        files = sorted(beside.iterdir(), key=lambda file: file.suffix == ".json")  # what describes comes last
        ordinary = beside / ".ordinary"
        ordinary.touch()
        for file in files:
            if file.is_file():
                file.chmod(ordinary.stat().st_mode)  # safetensors writes for its owner alone; servers are others
            file.replace(target / file.name)
    except OSError as error:
        raise ConfigError(_unwritten(target, error)) from error
    except SafetensorError as error:
        if "os error" not in str(error):  # not of the disk
            raise
        raise ConfigError(_unwritten(target, error)) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if made and not any(target.iterdir()):
            target.rmdir()


def _unwritten(target: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or _reason(error)
    return f"{target} cannot be written to: {reason}. Nothing there was changed."
