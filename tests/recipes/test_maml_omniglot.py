from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fastmeta.recipes import MAMLOmniglot, maml_omniglot, run
from fastmeta.training import Report
from tests.recipes.fakes import fake_omniglot


@pytest.fixture
def easy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maml_omniglot, "Omniglot", fake_omniglot)


def test_the_settings_are_the_published_ones() -> None:
    recipe = MAMLOmniglot.of("full", shots=5)
    assert (recipe.iterations, recipe.meta_batch, recipe.meta_lr) == (60_000, 32, 1e-3)
    assert (recipe.inner_lr, recipe.inner_steps, recipe.evaluation_steps) == (0.4, 1, 3)


@pytest.mark.parametrize("shots", [1, 5])
@pytest.mark.parametrize("queries", [None, 7])
def test_queries_are_k_a_class_unless_chosen(easy: None, shots: int, queries: int | None) -> None:
    recipe = MAMLOmniglot.of("short", shots=shots, queries=queries)
    trained = recipe.source().batch(1, 2)
    assert trained.support.x.shape == (2, 5 * shots, 1, 28, 28)
    assert trained.query.x.shape[1] == 5 * (queries or shots)
    words = f"{queries or shots} in training, {shots} in evaluation"
    assert words in recipe.notes()[0]


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_batch_norm_is_learned_and_does_not_adapt(easy: None, network: str) -> None:
    recipe = MAMLOmniglot.of("short", network=network, queries=2)
    maml = recipe.learner()
    norms = [m for m in maml.model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert len(norms) == 4
    assert all(norm.weight is None for norm in norms)  # a shift and no scale
    batch = recipe.source().batch(1, 2)
    maml.meta_gradient(batch)
    assert all(norm.bias.grad.abs().max() > 0 for norm in norms)
    adapted = maml.adapt(batch.support)[0].to_module()
    found = [m for m in adapted.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    pairs = zip(found, norms, strict=True)
    assert all(torch.equal(ours.bias, theirs.bias) for ours, theirs in pairs)


@pytest.mark.parametrize(
    ("preset", "network", "shots", "published", "floor"),
    [
        ("short", "mlp", 1, 0.897, 0.85),
        ("short", "mlp", 5, 0.975, 0.95),
        ("full", "mlp", 1, 0.897, None),
        ("short", "conv", 1, 0.987, None),
    ],
)
def test_targets(
    preset: str, network: str, shots: int, published: float, floor: float | None
) -> None:
    (target,) = MAMLOmniglot.of(preset, network=network, shots=shots).targets()
    assert (target.metric, target.steps) == ("accuracy", 3)
    assert (target.reference, target.at_least) == (published, floor)


def test_twenty_ways_without_a_published_number_have_no_target() -> None:
    assert MAMLOmniglot.of("short", ways=20).targets() == ()


def test_it_learns_easy_classes(easy: None, tmp_path: Path) -> None:
    recipe = MAMLOmniglot.of("short", iterations=40, meta_batch=8, queries=2, evaluation_tasks=40)
    report = run(recipe, tmp_path, progress=False)
    assert isinstance(report, Report)
    (evaluation,) = report.evaluations.values()
    before, after = evaluation.results[0].accuracy, evaluation.last.accuracy
    assert before is not None
    assert after is not None
    assert after.mean > before.mean + 0.3
    assert evaluation.transductive
    assert "accuracy" in (tmp_path / "metrics.jsonl").read_text() or recipe.iterations < 100


def test_an_unknown_network_is_named() -> None:
    with pytest.raises(ValueError, match="network must be mlp or conv, got 'lstm'"):
        MAMLOmniglot.of("short", network="lstm")


def test_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises((FileNotFoundError, ValueError), match=str(tmp_path)):
        MAMLOmniglot.of("short").source(tmp_path)


@pytest.mark.needs("data")
def test_it_learns_real_characters(tmp_path: Path) -> None:
    recipe = MAMLOmniglot.of("short", iterations=60, meta_batch=16, evaluation_tasks=100)
    report = run(recipe, tmp_path, progress=False)
    assert isinstance(report, Report)
    (evaluation,) = report.evaluations.values()
    after = evaluation.last.accuracy
    assert after is not None
    assert after.mean - after.interval > 0.3  # chance is 0.2
