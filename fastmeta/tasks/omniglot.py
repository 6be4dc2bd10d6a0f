"""Omniglot: 1623 handwritten characters of 50 alphabets, 20 drawings of each."""

from __future__ import annotations

import os
import random as python_random
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch

from fastmeta._checks import positive_int, value_error
from fastmeta.tasks._omniglot_files import SETS, Drawings, find_root, read_drawings, read_vinyals
from fastmeta.tasks.few_shot import FewShot, Rotations

__all__ = ["Omniglot", "OmniglotSplits"]

OmniglotSplits: TypeAlias = Literal["maml", "vinyals", "background"]
Resize: TypeAlias = Literal["nearest", "lanczos"]

_MAML_TRAIN, _MAML_VAL = 1100, 100


class Omniglot(FewShot):
    """N-way K-shot episodes from Omniglot, read as it is published.

    Images are ``[1, size, size]``, ink 1 on paper 0. Three ways to split the characters, each
    with its own names of splits:

    - "maml": 1100 "train", 100 "val" and 423 "test" characters, a shuffle with seed 1 as in MAML's
      code. That code shuffles the order in which ``os.listdir`` gives the folders of its author's
      disk with Python 2's generator; neither can be had, so the characters are shuffled from
      alphabetic order, and single characters fall on other sides than they did for the paper.
    - "vinyals": 1028 "train", 172 "val" and 423 "test" characters, from the published lists
      ``omniglot_vinyals_{train,val,test}.txt`` beside the images.
    - "background": the original 964 background characters, "train", and 659 evaluation
      characters, "test", of other alphabets.

    Args:
        root: the folder with ``images_background`` and ``images_evaluation``, each a zip or a
            folder, or the folder above it if it is called ``omniglot``; None: ``FASTMETA_DATA``.
        splits: which characters belong to which split.
        split: the default split.
        ways: classes N of an episode.
        shots: support rows K of each class.
        queries: query rows Q of each class, K + Q at most 20.
        rotations: "classes": a turned character is another class (4 times as many, as Vinyals et
            al.); "drawn": N characters, each with a turn drawn for it (as MAML's code, when testing
            too); "none".
        resize: "nearest" is what the papers' images are: they call Pillow's resize, MAML's code
            with LANCZOS, on one-bit images, for which Pillow always takes the nearest pixel, so
            images stay black and white. "lanczos" filters shades of grey.
        size: height and width in pixels.
        seed: which run.
        cache: the folder for the prepared images, 25 MB; None: ``$XDG_CACHE_HOME/fastmeta`` (or
            ``~/.cache/fastmeta``). They are prepared anew when files or options change.
        dtype: float32 or float64.
        device: where images are kept (25 MB, with rotations 100 MB) and tasks are made.

    Raises:
        FileNotFoundError: images or lists are not there.
        ValueError: a corrupt archive or image, another layout, an unknown option, or too few
            classes or drawings for N, K and Q.

    Example:
        >>> source = Omniglot("data", ways=5, shots=1, queries=15)  # doctest: +SKIP
        >>> source.batch(step=0, num_tasks=32).support.x.shape  # doctest: +SKIP
        torch.Size([32, 5, 1, 28, 28])

    Reference:
        Lake, Salakhutdinov, Tenenbaum (2015), "Human-level concept learning through probabilistic
        program induction". Vinyals et al. (2016), section 4.1.1. Finn et al. (2017), section 5.2.
    """

    names: list[str]
    """The characters, "Alphabet/characterNN"; ``classes["label"]`` of a batch counts in it."""

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        *,
        splits: OmniglotSplits = "maml",
        split: str = "train",
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        rotations: Rotations = "classes",
        resize: Resize = "nearest",
        size: int = 28,
        seed: int = 0,
        cache: str | os.PathLike[str] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if splits not in get_args(OmniglotSplits):
            must = f"be one of {get_args(OmniglotSplits)}"
            raise value_error("Omniglot", "splits", must, repr(splits))
        if resize not in get_args(Resize):
            raise value_error("Omniglot", "resize", f"be one of {get_args(Resize)}", repr(resize))
        size = positive_int("Omniglot", "size", size)
        folder = find_root(root)
        drawings = read_drawings(folder, size, resize, _cache_folder(cache))
        self.names = drawings.names
        super().__init__(
            torch.from_numpy(drawings.pixels).unsqueeze(1),
            torch.from_numpy(drawings.character),
            ways=ways,
            shots=shots,
            queries=queries,
            splits=_characters(splits, folder, drawings),
            split=split,
            rotations=rotations,
            seed=seed,
            dtype=dtype,
            device=device,
        )


def _characters(splits: str, folder: Path, drawings: Drawings) -> dict[str, list[int]]:
    total = len(drawings.names)
    if splits == "background":
        background = [i for i in range(total) if drawings.sets[i] == SETS[0]]
        evaluation = [i for i in range(total) if drawings.sets[i] == SETS[1]]
        return {"train": background, "test": evaluation}
    if splits == "vinyals":
        place = {name: i for i, name in enumerate(drawings.names)}
        lists = read_vinyals(folder, drawings.names)
        return {split: [place[name] for name in names] for split, names in lists.items()}
    if total <= _MAML_TRAIN + _MAML_VAL:
        must = f"hold more than {_MAML_TRAIN + _MAML_VAL} characters for splits='maml'"
        raise value_error("Omniglot", "root", must, f"{total}")
    order = list(range(total))
    python_random.Random(1).shuffle(order)
    ends = (_MAML_TRAIN, _MAML_TRAIN + _MAML_VAL)
    return {"train": order[: ends[0]], "val": order[ends[0] : ends[1]], "test": order[ends[1] :]}


def _cache_folder(cache: str | os.PathLike[str] | None) -> Path:
    if cache is not None:
        return Path(cache)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fastmeta"
