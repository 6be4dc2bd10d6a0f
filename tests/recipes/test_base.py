from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fastmeta.recipes import RECIPES, MAMLOmniglot, MAMLSinusoid, Recipe


@pytest.mark.parametrize("name", sorted(RECIPES))
@pytest.mark.parametrize("preset", ["short", "full"])
def test_every_recipe_has_both_presets(name: str, preset: str) -> None:
    kind = RECIPES[name]
    recipe = kind.of(preset)
    assert recipe.as_preset
    assert kind(**recipe.settings()) == recipe
    assert kind.__doc__
    assert "Reference:" in kind.__doc__


def test_choices_keep_the_preset_and_settings_leave_it() -> None:
    assert MAMLSinusoid.of("full", shots=10, seed=7, path="reference").as_preset
    assert not MAMLSinusoid.of("full", iterations=5).as_preset
    assert not MAMLSinusoid.of("full", inner_lr=0.1).as_preset


def test_floors_hold_for_a_preset_alone() -> None:
    assert MAMLSinusoid.of("short").targets()[0].at_most is not None
    changed = MAMLSinusoid.of("short", iterations=10).targets()[0]
    assert (changed.at_most, changed.reference) == (None, 0.67)


def test_none_leaves_the_presets_value() -> None:
    assert MAMLSinusoid.of("short", iterations=None) == MAMLSinusoid.of("short")


def test_labels_tell_runs_apart() -> None:
    recipes: list[Recipe] = [
        MAMLSinusoid.of("short"),
        MAMLSinusoid.of("full"),
        MAMLSinusoid.of("short", shots=10),
        MAMLSinusoid.of("short", seed=1),
        MAMLOmniglot.of("short"),
        MAMLOmniglot.of("short", network="conv"),
    ]
    assert len({recipe.label for recipe in recipes}) == len(recipes)


def test_recipes_are_values() -> None:
    recipe = MAMLSinusoid.of("short")
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.shots = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("error", "message", "preset", "settings"),
    [
        (ValueError, "preset must be one of short, full, got 'long'", "long", {}),
        (
            TypeError,
            "a setting must be one of its settings .* got 'network'",
            "short",
            {"network": 1},
        ),
        (ValueError, "shots must be at least 1, got 0", "short", {"shots": 0}),
        (TypeError, "shots must be an int", "short", {"shots": 1.5}),
        (ValueError, "iterations must be at least 0, got -1", "short", {"iterations": -1}),
        (ValueError, "seed must be at least 0", "short", {"seed": -1}),
        (ValueError, "meta_batch must be at least 1", "short", {"meta_batch": 0}),
        (ValueError, "inner_lr must be at least 0", "short", {"inner_lr": -0.1}),
        (ValueError, "inner_lr must be finite", "short", {"inner_lr": float("nan")}),
        (ValueError, "path must be one of auto, fused", "short", {"path": "warp"}),
    ],
)
def test_bad_settings_are_named(
    error: type[Exception], message: str, preset: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(error, match=f"maml-sinusoid: {message}"):
        MAMLSinusoid.of(preset, **settings)
