"""Omniglot as it is published: two zips or two folders of 105x105 one-bit drawings."""

from __future__ import annotations

import hashlib
import io
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from fastmeta._checks import value_error

__all__ = ["SETS", "Drawings", "find_root", "read_drawings", "read_vinyals"]

SETS = ("images_background", "images_evaluation")
Pixels: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

_OP = "Omniglot"
_MEMBER = re.compile(r"(?:^|/)(images_\w+)/([^/]+)/(character\d+)/([^/]+\.png)$")
_VERSION = 1  # of the cached array: raise it when preparation changes
_FILTERS = {"nearest": 0, "lanczos": 1}  # Pillow's numbers, without importing it


@dataclass(frozen=True)
class Drawings:
    """All drawings of both sets, sorted by alphabet and character."""

    pixels: Pixels  # [M, H, W], ink is 255
    character: np.ndarray[Any, np.dtype[np.int64]]  # [M], a place in `names`
    names: list[str]  # "Alphabet/characterNN"
    sets: list[str]  # of each character, one of SETS


@dataclass(frozen=True)
class _Entry:
    character: str
    drawing: str
    source: str  # one of SETS
    where: str  # path, or name in the zip
    stamp: str  # changes with the content


def find_root(root: str | os.PathLike[str] | None) -> Path:
    """The folder that holds both sets: ``root`` or its folder ``omniglot``."""
    given = os.fspath(root) if root is not None else os.environ.get("FASTMETA_DATA")
    if not given:
        raise value_error(
            _OP, "root", "be the folder of the data, or FASTMETA_DATA be set to it", "neither"
        )
    top = Path(given)
    for folder in (top, top / "omniglot"):
        if all(_location(folder, name) for name in SETS):
            return folder
    wanted = " and ".join(f"{name}.zip (or {name}/)" for name in SETS)
    raise FileNotFoundError(
        f"{_OP}: root must hold {wanted}, itself or in its folder omniglot/, got {top}"
    )


def _location(folder: Path, name: str) -> Path | None:
    archive, unpacked = folder / f"{name}.zip", folder / name
    if archive.is_file():
        return archive
    return unpacked if unpacked.is_dir() else None


def read_drawings(folder: Path, size: int, resize: str, cache: Path | None) -> Drawings:
    """Read, resize and invert all drawings, or map what was prepared before."""
    locations = {name: _location(folder, name) or folder for name in SETS}
    entries = sorted(
        (entry for name in SETS for entry in _list(locations[name], name)),
        key=lambda entry: (entry.character, entry.drawing),
    )
    names = sorted({entry.character for entry in entries})
    place = {name: i for i, name in enumerate(names)}
    sets = {entry.character: entry.source for entry in entries}
    character = np.array([place[entry.character] for entry in entries], dtype=np.int64)
    prepared = None if cache is None else cache / f"{_fingerprint(entries, size, resize)}.npy"
    pixels = None if prepared is None else _load_cached(prepared, (len(entries), size, size))
    if pixels is None:
        pixels = _decode(locations, entries, size, _FILTERS[resize])
        if prepared is not None:
            _save(prepared, pixels)
    return Drawings(pixels, character, names, [sets[name] for name in names])


def read_vinyals(folder: Path, names: Iterable[str]) -> dict[str, list[str]]:
    """The characters of the split of Vinyals et al., from its published lists."""
    known = set(names)
    result = {}
    for split in ("train", "val", "test"):
        path = folder / f"omniglot_vinyals_{split}.txt"
        if not path.is_file():
            raise FileNotFoundError(
                f"{_OP}: splits='vinyals' must find its list of classes beside the images, "
                f"got no {path}"
            )
        # "Alphabet/characterNN/rotDDD": all four rotations of a character are in one split
        lines = path.read_text(encoding="utf-8").split()
        characters = sorted({line.rsplit("/rot", 1)[0] for line in lines})
        unknown = [name for name in characters if name not in known]
        if unknown or not characters:
            got = f"{unknown[0]!r}" if unknown else "no line"
            raise value_error(_OP, path.name, "name characters of the images", got)
        result[split] = characters
    return result


def _list(location: Path, name: str) -> list[_Entry]:
    if location.suffix == ".zip":
        with _open(location) as archive:
            found = [(info.filename, f"{info.CRC:08x}") for info in archive.infolist()]
    else:
        paths = location.glob("*/character*/*.png")
        stats = ((path, path.stat()) for path in paths)
        found = [
            (f"{name}/{path.relative_to(location).as_posix()}", f"{s.st_size}.{s.st_mtime_ns}")
            for path, s in stats
        ]
    entries = []
    for where, stamp in found:
        match = _MEMBER.search(where)
        if match and match[1] == name and "__MACOSX" not in where:
            entries.append(_Entry(f"{match[2]}/{match[3]}", match[4], name, where, stamp))
    if not entries:
        must = f"hold {name}/ALPHABET/characterNN/NNNN_NN.png"
        raise value_error(_OP, str(location), must, "no such file in it")
    return entries


def _open(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise value_error(_OP, str(path), "be a whole zip archive", f"{error}") from error


def _decode(locations: dict[str, Path], entries: list[_Entry], size: int, resample: int) -> Pixels:
    """``[M, size, size]``, ink 255 on 0."""
    try:
        from PIL import Image
    except ImportError as error:
        message = "Omniglot reads PNG files with Pillow: pip install 'fastmeta[data]'"
        raise ImportError(message) from error

    pixels = np.empty((len(entries), size, size), dtype=np.uint8)

    def convert(number: int, data: bytes) -> None:
        try:
            image = Image.open(io.BytesIO(data)).convert("L")
            small = image.resize((size, size), resample=Image.Resampling(resample))
        except Exception as error:  # Pillow has no common class for what a broken file raises
            where = f"{locations[entries[number].source]}: {entries[number].where}"
            raise value_error(_OP, where, "be a PNG image", f"{error}") from error
        pixels[number] = 255 - np.asarray(small)

    # Pillow lets go of the interpreter while it decodes and resizes; zips are read by one thread.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        jobs = [pool.submit(convert, number, data) for number, data in _read(locations, entries)]
        for job in jobs:
            job.result()
    return pixels


def _read(locations: dict[str, Path], entries: list[_Entry]) -> Iterable[tuple[int, bytes]]:
    for name in SETS:
        location = locations[name]
        mine = [(i, entry) for i, entry in enumerate(entries) if entry.source == name]
        if location.suffix != ".zip":
            for i, entry in mine:
                yield i, (location.parent / entry.where).read_bytes()
            continue
        with _open(location) as archive:
            for i, entry in mine:
                try:
                    yield i, archive.read(entry.where)
                except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:
                    where = f"{location}: {entry.where}"
                    raise value_error(_OP, where, "be intact", f"{error}") from error


def _fingerprint(entries: list[_Entry], size: int, resize: str) -> str:
    digest = hashlib.sha256(f"{_VERSION} {size} {resize}\n".encode())
    for entry in entries:
        digest.update(f"{entry.source} {entry.character}/{entry.drawing} {entry.stamp}\n".encode())
    return f"omniglot-{size}-{resize}-{digest.hexdigest()[:16]}"


def _load_cached(path: Path, shape: tuple[int, ...]) -> Pixels | None:
    """The prepared array, mapped copy-on-write; None if there is none or it is not whole."""
    try:
        pixels = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return pixels if pixels.shape == shape and pixels.dtype == np.uint8 else None


def _save(path: Path, pixels: Pixels) -> None:
    """Write beside the target, then rename: no one ever sees half a file.

    A cache that cannot be written costs time on the next run and is no reason to fail this one.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            try:
                np.save(file, pixels, allow_pickle=False)
                file.close()
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError:
        return
