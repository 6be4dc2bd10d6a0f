from __future__ import annotations

import math

import pytest
import torch

from fastmeta.recipes import MAMLSinusoid


def test_the_settings_are_the_published_ones() -> None:
    recipe = MAMLSinusoid.of("full")
    assert (recipe.iterations, recipe.meta_batch, recipe.meta_lr) == (70_000, 25, 1e-3)
    assert (recipe.inner_lr, recipe.inner_steps) == (0.01, 1)
    source = recipe.source()
    assert (source.shots, source.queries) == (5, 5)
    assert (source.amplitude, source.phase, source.x) == ((0.1, 5.0), (0.0, math.pi), (-5.0, 5.0))


def test_the_network_is_the_published_one() -> None:
    model = MAMLSinusoid.of("short").learner().model
    shapes = [tuple(p.shape) for p in model.parameters()]
    assert shapes == [(40, 1), (40,), (40, 40), (40,), (1, 40), (1,)]
    weight = model[2].weight
    assert weight.abs().max() <= 0.02
    assert weight.std().item() == pytest.approx(0.0088, rel=0.1)  # 0.01, cut at two deviations
    assert all(torch.all(layer.bias == 0) for layer in model if hasattr(layer, "bias"))


def test_the_seed_decides_the_network_and_leaves_torchs_own() -> None:
    torch.manual_seed(4)
    before = torch.get_rng_state()
    one, same, other = (MAMLSinusoid.of("short", seed=s).learner().model for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one[0].weight, same[0].weight)
    assert not torch.equal(one[0].weight, other[0].weight)


@pytest.mark.parametrize(
    ("shots", "reference", "low", "high"), [(5, 0.67, 0.62, 0.72), (10, 0.4, 0.36, 0.44)]
)
def test_full_asks_for_the_reference_number(
    shots: int, reference: float, low: float, high: float
) -> None:
    (target,) = MAMLSinusoid.of("full", shots=shots).targets()
    assert (target.metric, target.steps, target.reference) == ("loss", 1, reference)
    assert target.at_least == pytest.approx(low)
    assert target.at_most == pytest.approx(high)


def test_only_the_papers_number_is_said_to_be_the_papers() -> None:
    sources = {shots: MAMLSinusoid.of("full", shots=shots).targets()[0].source for shots in (5, 10)}
    assert "Finn" in sources[5]
    assert sources[10].startswith("measured")


def test_other_shots_have_no_target() -> None:
    assert MAMLSinusoid.of("full", shots=7).targets() == ()


def test_evaluation_reports_each_step() -> None:
    recipe = MAMLSinusoid.of("short", evaluation_tasks=10)
    (result,) = recipe.evaluate(recipe.learner()).values()
    assert [item.steps for item in result.results] == list(range(11))
    assert result.split == "test"
