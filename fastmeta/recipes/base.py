"""What a recipe is: one published experiment as a typed value."""

from __future__ import annotations

import abc
import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch

from fastmeta._checks import describe, number, positive_int, type_error, value_error, whole_number
from fastmeta.algorithms import Algorithm
from fastmeta.inner_loop.engine import PATHS, PathName
from fastmeta.tasks import TaskSource
from fastmeta.training.evaluation import Evaluation
from fastmeta.training.report import Target

_Self = TypeVar("_Self", bound="Recipe")


@dataclass(frozen=True)
class Recipe(abc.ABC):
    """A published experiment: task source, learner, algorithm, schedule, published numbers.

    A recipe is a frozen value and its fields are its settings. ``preset`` names what they start
    from; :meth:`of` builds one. Two recipes that are equal give the same run.

    Attributes:
        preset: what the settings started from.
        seed: of the tasks and of the initial parameters.
        iterations: of meta-training.
        meta_batch: tasks T of an iteration.
        meta_lr: the outer rate, of Adam.
        evaluation_tasks: held-out tasks.
        path: how the engine runs.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]
    # What may be chosen freely without leaving a preset: its floors are for each choice of these.
    choices: ClassVar[tuple[str, ...]] = ("seed", "path")

    preset: str = "short"
    seed: int = 0
    iterations: int = 0
    meta_batch: int = 25
    meta_lr: float = 1e-3
    evaluation_tasks: int = 600
    path: PathName = "auto"

    def __post_init__(self) -> None:
        for name, least in (
            ("seed", 0),
            ("iterations", 0),
            ("meta_batch", 1),
            ("evaluation_tasks", 1),
        ):
            whole_number(self.name, name, getattr(self, name), at_least=least)
        if self.seed >= 2**63:  # torch's generators and the task source take 64 signed bits
            raise value_error(self.name, "seed", "be at least 0 and below 2**63", self.seed)
        number(self.name, "meta_lr", self.meta_lr, at_least=0.0)
        if self.path not in ("auto", *PATHS):
            must = f"be one of {', '.join(('auto', *PATHS))}"
            raise value_error(self.name, "path", must, describe(self.path))

    @classmethod
    def of(cls: type[_Self], preset: str = "short", **settings: Any) -> _Self:
        """The recipe of a preset, with some settings changed.

        Args:
            preset: one of :attr:`presets`.
            **settings: fields to set, by name; None leaves the preset's value.

        Raises:
            ValueError: an unknown preset, or a value out of range.
            TypeError: an unknown setting, or a value of the wrong kind.

        Example:
            >>> from fastmeta.recipes import MAMLSinusoid
            >>> MAMLSinusoid.of("full", shots=10).iterations
            70000
        """
        if preset not in cls.presets:
            raise value_error(
                cls.name, "preset", f"be one of {', '.join(cls.presets)}", describe(preset)
            )
        fields = {field.name for field in dataclasses.fields(cls)} - {"preset"}
        given = {name: value for name, value in settings.items() if value is not None}
        for name in given:
            if name not in fields:
                must = f"be one of its settings ({', '.join(sorted(fields))})"
                raise type_error(cls.name, "a setting", must, repr(name))
        chosen = {name: value for name, value in given.items() if name in cls.choices}
        base = cls(preset=preset, **{**cls.defaults(preset, chosen), **chosen})
        return dataclasses.replace(base, **given)

    @classmethod
    def defaults(cls, preset: str, chosen: Mapping[str, Any]) -> Mapping[str, Any]:
        """The preset's settings, given what was chosen among :attr:`choices`."""
        return cls.presets[preset]

    @property
    def as_preset(self) -> bool:
        """Whether these are the preset's settings, so that its floors apply."""
        chosen = {name: getattr(self, name) for name in self.choices}
        return self == type(self).of(self.preset, **chosen)

    @property
    def label(self) -> str:
        """A short name for this recipe's folder: what was chosen, and the preset.

        Example:
            >>> from fastmeta.recipes import MAMLSinusoid
            >>> MAMLSinusoid.of("full", shots=10).label
            'maml-sinusoid-shots10-full-seed0'
        """
        chosen = [
            value if isinstance(value, str) else f"{name}{value}"
            for name in self.choices
            if name not in Recipe.choices
            for value in (getattr(self, name),)
        ]
        return "-".join([self.name, *chosen, self.preset, f"seed{self.seed}"])

    def settings(self) -> dict[str, Any]:
        """The settings as plain values; ``type(self)(**settings)`` is this recipe again."""
        return dataclasses.asdict(self)

    @abc.abstractmethod
    def learner(self) -> Algorithm:
        """The algorithm with its freshly initialised model, by the recipe's seed."""

    @abc.abstractmethod
    def source(self, data_root: str | os.PathLike[str] | None = None) -> TaskSource:
        """Where the tasks of meta-training come from."""

    @abc.abstractmethod
    def evaluate(
        self, learner: Algorithm, data_root: str | os.PathLike[str] | None = None
    ) -> dict[str, Evaluation]:
        """Evaluations on held-out tasks by label, the one that targets speak of first."""

    @abc.abstractmethod
    def validate(
        self, learner: Algorithm, data_root: str | os.PathLike[str] | None = None
    ) -> Evaluation:
        """A quick evaluation on the validation split, whose last step says how good it is."""

    def optimizer(self, learner: Algorithm) -> torch.optim.Optimizer:
        """Adam over the meta-parameters, as in all of the published gradient-based recipes."""
        return torch.optim.Adam(learner.parameters(), lr=self.meta_lr)

    def targets(self) -> Sequence[Target]:
        """Numbers to compare with, and the floors of the preset as it stands."""
        return ()

    def notes(self) -> Sequence[str]:
        """Sentences that a reader of the report needs."""
        return ()


VALIDATION_TASKS = 200


def check_positive(name: str, **values: int) -> None:
    """Raise unless each value is a whole number of at least 1."""
    for argument, value in values.items():
        positive_int(name, argument, value)
