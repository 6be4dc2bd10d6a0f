"""Omniglot in its published layout: a small copy made here, and the real one where it is."""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastmeta.tasks import Omniglot
from fastmeta.tasks import _omniglot_files as files

ALPHABETS = {
    "images_background": {"Alpha": 4, "Gamma": 3},
    "images_evaluation": {"Beta": 3, "Delta_(of_two)": 2},
}
DRAWINGS = 4
TOTAL = 12


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of one-bit PNGs, 105x105, paper white, with the character's number drawn in."""
    root = tmp_path_factory.mktemp("omniglot-data") / "omniglot"
    generator = np.random.default_rng(0)
    number = 0
    for name, alphabets in ALPHABETS.items():
        for alphabet, characters in alphabets.items():
            for character in range(1, characters + 1):
                number += 1
                folder = root / name / alphabet / f"character{character:02d}"
                folder.mkdir(parents=True)
                for drawing in range(1, DRAWINGS + 1):
                    pixels = np.full((105, 105), 255, dtype=np.uint8)
                    pixels[5 : 5 + 7 * number, 20:40] = 0
                    spots = generator.integers(0, 105, (2, 200))
                    pixels[spots[0], spots[1]] = 0
                    image = Image.fromarray(pixels).convert("1", dither=Image.Dither.NONE)
                    image.save(folder / f"{number:04d}_{drawing:02d}.png")
    names = [
        f"{a}/character{c:02d}"
        for s in ALPHABETS.values()
        for a, n in s.items()
        for c in range(1, n + 1)
    ]
    cuts = {"train": names[:6], "val": names[6:8], "test": names[8:]}
    for split, members in cuts.items():
        lines = [f"{name}/rot{turn:03d}" for name in members for turn in (0, 90, 180, 270)]
        (root / f"omniglot_vinyals_{split}.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def zipped(unpacked: Path, tmp_path: Path) -> Path:
    for name in files.SETS:
        shutil.make_archive(str(tmp_path / name), "zip", unpacked, name)
    for lists in unpacked.glob("*.txt"):
        shutil.copy(lists, tmp_path)
    return tmp_path


def small(root: Path, cache: Path, **options: Any) -> Omniglot:
    defaults = {"ways": 2, "shots": 1, "queries": 2, "splits": "background"}
    return Omniglot(root, cache=cache, **(defaults | options))


def test_zip_and_folder_are_the_same(unpacked: Path, zipped: Path, tmp_path: Path) -> None:
    a, b = small(unpacked, tmp_path / "a"), small(zipped, tmp_path / "b")
    assert a._table.equal(b._table)
    assert a.names == b.names == sorted(a.names)
    assert a.batch(0, 8).query.x.equal(b.batch(0, 8).query.x)
    assert small(unpacked.parent, tmp_path / "a").names == a.names


def test_images_are_the_files_with_ink_one(unpacked: Path, tmp_path: Path) -> None:
    for resize, pillow in (("nearest", None), ("lanczos", Image.Resampling.LANCZOS)):
        source = small(unpacked, tmp_path, resize=resize, rotations="none", queries=3)
        batch = source.batch(0, 6)
        for task in range(6):
            for way in range(2):
                name = source.names[batch.classes["label"][task, way]]
                expected = []
                for path in sorted((unpacked / "images_background" / name).iterdir()):
                    image = Image.open(path)
                    assert image.mode == "1"
                    if pillow is None:  # what MAML's code calls, and what comes of it
                        shrunk = image.resize((28, 28), resample=Image.Resampling.LANCZOS)
                    else:
                        shrunk = image.convert("L").resize((28, 28), resample=pillow)
                    paper = np.asarray(shrunk.convert("L"), dtype=np.float32)
                    expected.append(torch.from_numpy((255 - paper) / 255))
                mine = torch.cat(
                    (
                        batch.support.x[task, batch.support.y[task] == way],
                        batch.query.x[task, batch.query.y[task] == way],
                    )
                )[:, 0]
                for image in mine:
                    assert sum(bool(image.equal(other)) for other in expected) == 1


def test_shapes_and_sizes(unpacked: Path, tmp_path: Path) -> None:
    batch = small(unpacked, tmp_path, size=20, dtype=torch.float64).batch(0, 3)
    assert batch.support.x.shape == (3, 2, 1, 20, 20)
    assert batch.support.x.dtype == torch.float64
    assert batch.support.x.min() == 0
    assert batch.support.x.max() == 1


def test_background_split(unpacked: Path, tmp_path: Path) -> None:
    source = small(unpacked, tmp_path, rotations="drawn")
    assert source.splits == ("train", "test")
    for split, part in (("train", "images_background"), ("test", "images_evaluation")):
        labels = source.batch(0, 100, split=split).classes["label"].unique().tolist()
        alphabets = {source.names[label].split("/")[0] for label in labels}
        assert alphabets == set(ALPHABETS[part])
        assert source.num_classes(split) == sum(ALPHABETS[part].values())


def test_vinyals_split(zipped: Path, tmp_path: Path) -> None:
    source = small(zipped, tmp_path / "cache", splits="vinyals")
    assert source.splits == ("train", "val", "test")
    assert [source.num_classes(split) for split in source.splits] == [24, 8, 16]
    labels = source.batch(0, 100, split="val").classes["label"].unique().tolist()
    assert [source.names[label] for label in labels] == ["Beta/character01", "Gamma/character03"]


def test_maml_split_needs_all_characters(unpacked: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="more than 1200 characters for splits='maml', got 12"):
        small(unpacked, tmp_path, splits="maml")


def test_default_root_is_the_environment(
    unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTMETA_DATA", str(unpacked.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = Omniglot(splits="background", ways=2, shots=1, queries=1)
    assert len(source.names) == TOTAL
    assert len(list((tmp_path / "fastmeta").glob("*.npy"))) == 1
    monkeypatch.delenv("FASTMETA_DATA")
    with pytest.raises(ValueError, match="root must be the folder of the data, or FASTMETA_DATA"):
        Omniglot()


def test_cache_is_used_and_made_anew(
    zipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    first = small(zipped, cache)
    (prepared,) = cache.iterdir()
    decoded: list[int] = []
    original = files._decode

    def counting(*arguments: Any) -> Any:
        decoded.append(1)
        return original(*arguments)

    monkeypatch.setattr(files, "_decode", counting)
    assert small(zipped, cache)._table.equal(first._table)
    assert not decoded
    prepared.write_bytes(prepared.read_bytes()[:1000])  # cut off
    assert small(zipped, cache)._table.equal(first._table)
    assert len(decoded) == 1
    np.save(prepared, np.array([{}], dtype=object), allow_pickle=True)  # a pickle is not read
    assert small(zipped, cache)._table.equal(first._table)
    assert len(decoded) == 2
    small(zipped, cache, size=20)
    with zipfile.ZipFile(zipped / "images_background.zip", "a") as archive:
        png = archive.read("images_background/Alpha/character01/0001_01.png")
        archive.writestr("images_background/Alpha/character01/0001_05.png", png)
    assert len(small(zipped, cache)._table) == len(first._table) + 4
    assert len(decoded) == 4
    assert not list(cache.glob("*.tmp"))


def test_cache_that_cannot_be_written_is_done_without(zipped: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert len(small(zipped, blocked / "cache").names) == TOTAL


def test_images_may_be_changed_without_touching_the_cache(zipped: Path, tmp_path: Path) -> None:
    first = small(zipped, tmp_path / "c", rotations="none")
    again = small(zipped, tmp_path / "c", rotations="none")
    again._table.zero_()
    assert small(zipped, tmp_path / "c", rotations="none")._table.equal(first._table)


def broken_archive(root: Path) -> str:
    (root / "images_evaluation.zip").write_bytes(b"PK not a zip")
    return "images_evaluation.zip must be a whole zip archive"


def cut_archive(root: Path) -> str:
    path = root / "images_background.zip"
    path.write_bytes(path.read_bytes()[:-500])
    return "images_background.zip must be a whole zip archive"


def flipped_bytes(root: Path) -> str:
    path = root / "images_background.zip"
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("images_background/Gamma/character01/0005_02.png")
    for i in range(info.header_offset + 100, info.header_offset + 140):
        data[i] ^= 0xFF
    path.write_bytes(data)
    return "0005_02.png must be intact"


def no_image(root: Path) -> str:
    with zipfile.ZipFile(root / "images_background.zip", "a") as archive:
        archive.writestr("images_background/Alpha/character01/0001_09.png", b"not a PNG")
    return "0001_09.png must be a PNG image"


def other_layout(root: Path) -> str:
    with zipfile.ZipFile(root / "images_background.zip", "w") as archive:
        archive.writestr("images_background/readme.txt", b"")
    return "must hold images_background/ALPHABET/characterNN/NNNN_NN.png"


@pytest.mark.parametrize(
    "damage", [broken_archive, cut_archive, flipped_bytes, no_image, other_layout]
)
def test_damaged_data_is_refused_by_name(zipped: Path, tmp_path: Path, damage: Any) -> None:
    message = damage(zipped)
    with pytest.raises(ValueError, match=message) as caught:
        small(zipped, tmp_path / "cache")
    assert str(caught.value).startswith("Omniglot: ")
    assert not (tmp_path / "cache").exists()


def test_missing_data_is_refused_by_name(zipped: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"root must hold images_background\.zip"):
        small(tmp_path / "nowhere", tmp_path)
    (zipped / "omniglot_vinyals_val.txt").write_text("Greek/character01/rot000\n")
    with pytest.raises(ValueError, match="must name characters of the images, got 'Greek/chara"):
        small(zipped, tmp_path / "cache", splits="vinyals")
    (zipped / "omniglot_vinyals_val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"omniglot_vinyals_val\.txt"):
        small(zipped, tmp_path / "cache", splits="vinyals")
    (zipped / "images_evaluation.zip").unlink()
    with pytest.raises(FileNotFoundError, match="root must hold"):
        small(zipped, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": "random"}, "splits must be one of"),
        ({"resize": "cubic"}, "resize must be one of"),
        ({"size": 0}, "size must be at least 1"),
        ({"rotations": "yes"}, "rotations must be one of"),
        ({"split": "val"}, "split must be one of"),
        ({"shots": 3}, "at most the 4 examples"),
        ({"ways": 40}, "at most the 28 classes"),
    ],
    ids=["splits", "resize", "size", "rotations", "split", "examples", "ways"],
)
def test_wrong_options_are_refused_by_name(
    unpacked: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"Omniglot: .*{message}"):
        small(unpacked, tmp_path, **options)


def test_without_pillow_the_extra_is_named(
    unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"fastmeta\[data\]"):
        small(unpacked, tmp_path)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real-omniglot")


@pytest.mark.needs("data")
@pytest.mark.parametrize(
    ("splits", "counts"),
    [("maml", [1100, 100, 423]), ("vinyals", [1028, 172, 423]), ("background", [964, 659])],
)
def test_real_splits(cache: Path, splits: Any, counts: list[int]) -> None:
    source = Omniglot(cache=cache, splits=splits, rotations="drawn")
    assert len(source.names) == 1623
    assert [source.num_classes(split) for split in source.splits] == counts
    labels = [set(source._find(split).labels.tolist()) for split in source.splits]
    assert sum(map(len, labels)) == len(set.union(*labels)) == 1623
    assert source.replace(ways=20, shots=5).batch(0, 2).query.x.shape == (2, 300, 1, 28, 28)


@pytest.mark.needs("data")
def test_real_images(cache: Path) -> None:
    source = Omniglot(cache=cache, rotations="none")
    assert source._table.shape == (32460, 784)
    assert source._table.unique().tolist() == [0, 255]
    assert 0.06 < source._table.double().mean() / 255 < 0.10
    first = source.names.index("Latin/character01")
    folder = Path(os.environ["FASTMETA_DATA"])
    folder = folder / "omniglot" if (folder / "omniglot").is_dir() else folder
    with zipfile.ZipFile(folder / "images_background.zip") as archive:
        (name,) = [n for n in archive.namelist() if "Latin/character01" in n and "_01.png" in n]
        with archive.open(name) as file:
            image = Image.open(file).resize((28, 28), resample=Image.Resampling.LANCZOS)
    expected = 255 - np.asarray(image.convert("L"))
    assert (source._table[first * 20].view(28, 28).numpy() == expected).all()
