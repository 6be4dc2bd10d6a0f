from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from fastmeta.algorithms import MAML
from fastmeta.batch import Examples, TaskBatch
from fastmeta.tasks import FewShot, Sinusoid, TaskSource
from fastmeta.training import evaluate, summarize
from tests.training.runs import learner


def _classes(queries: int = 3) -> FewShot:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(12).repeat_interleave(10)
    x = torch.randn(12, 6, generator=generator)[y] + torch.randn(120, 6, generator=generator)
    splits = {"train": list(range(6)), "test": list(range(6, 12))}
    return FewShot(x, y, ways=3, shots=2, queries=queries, splits=splits)


def _classifier(norm: nn.Module | None = None) -> MAML:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), norm or nn.Identity(), nn.ReLU(), nn.Linear(8, 3)]
    return MAML(nn.Sequential(*layers), loss=cross_entropy, lr=0.5)


def test_each_number_of_steps_is_evaluated_on_the_same_tasks() -> None:
    maml, source = learner(), Sinusoid(shots=5)
    result = evaluate(maml, source, steps=2, tasks=30)
    batch = source.batch(0, 30, split="test")
    for steps in range(3):
        output = maml.adapt(batch.support, steps=steps)(batch.query.x)
        expected = (output - batch.query.y).square().mean((1, 2))
        found = result.after(steps).loss
        assert found.mean == pytest.approx(summarize(expected).mean, rel=1e-5)
        assert found.interval == pytest.approx(summarize(expected).interval, rel=1e-5)
        assert found.tasks == 30
    assert result.after(0).loss.mean != result.after(2).loss.mean


def test_the_chunk_size_does_not_matter() -> None:
    maml, source = learner(), Sinusoid(shots=5)
    whole = evaluate(maml, source, steps=1, tasks=50, chunk_size=50)
    parts = evaluate(maml, source, steps=1, tasks=50, chunk_size=7)
    for ours, theirs in zip(whole.results, parts.results, strict=True):
        assert ours.loss.mean == pytest.approx(theirs.loss.mean, rel=1e-6)


def test_chosen_steps_come_in_order() -> None:
    result = evaluate(learner(), Sinusoid(shots=5), steps=(5, 0, 1, 5), tasks=5)
    assert [item.steps for item in result.results] == [0, 1, 5]
    with pytest.raises(ValueError, match="steps must be one of 0, 1, 5, got 3"):
        result.after(3)


def test_accuracy_is_reported_for_classes() -> None:
    result = evaluate(_classifier(), _classes(), steps=3, tasks=40)
    first, last = result.results[0].accuracy, result.last.accuracy
    assert first is not None
    assert last is not None
    assert 0.2 < first.mean < 0.5  # about one in three before adaptation
    assert last.mean > first.mean + 0.2
    assert "accuracy" in result.table()
    assert result.to_json()["results"][3]["accuracy"]["tasks"] == 40


@pytest.mark.parametrize("batch_norm", ["batch", "track"])
def test_the_meta_model_is_not_changed(batch_norm: Any) -> None:
    maml = _classifier(nn.BatchNorm1d(8))
    maml.batch_norm = batch_norm
    before = {name: value.clone() for name, value in maml.state_dict().items()}
    evaluate(maml, _classes(), steps=2, tasks=10)
    evaluate(maml, _classes(), steps=2, tasks=2, transductive=False)
    after = maml.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in maml.parameters())


def test_without_batch_statistics_queries_may_come_one_at_a_time() -> None:
    maml, source = _classifier(), _classes()
    together = evaluate(maml, source, steps=2, tasks=10)
    single = evaluate(maml, source, steps=2, tasks=10, transductive=False)
    for ours, theirs in zip(together.results, single.results, strict=True):
        assert ours.loss.mean == pytest.approx(theirs.loss.mean, rel=1e-5)
    assert (together.transductive, single.transductive) == (True, False)


def test_with_batch_statistics_the_difference_shows() -> None:
    maml, source = _classifier(nn.BatchNorm1d(8, track_running_stats=False)), _classes()
    together = evaluate(maml, source, steps=2, tasks=10)
    single = evaluate(maml, source, steps=2, tasks=10, transductive=False)
    assert together.last.loss.mean != pytest.approx(single.last.loss.mean, rel=1e-3)


def test_one_query_at_a_time_never_sees_another_query() -> None:
    """What is predicted for a query stays, whatever the other queries are."""

    class Changed(TaskSource):
        def sample(self, step: int, indices: Any, *, split: str | None = None) -> TaskBatch:
            batch = _classes().sample(step, indices, split=split)
            x = batch.query.x.clone()
            x[:, 1:] = 100.0
            weight = torch.zeros(x.shape[:2])
            weight[:, 0] = 1.0
            return TaskBatch(batch.support, Examples(x, batch.query.y, weight))

    class Weighted(TaskSource):
        def sample(self, step: int, indices: Any, *, split: str | None = None) -> TaskBatch:
            batch = _classes().sample(step, indices, split=split)
            weight = torch.zeros(batch.query.y.shape)
            weight[:, 0] = 1.0
            return TaskBatch(batch.support, Examples(batch.query.x, batch.query.y, weight))

    def rows(output: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(output, y, reduction="none")

    maml = _classifier(nn.BatchNorm1d(8, track_running_stats=False))
    maml.loss = rows
    plain = evaluate(maml, Weighted(), steps=[2], tasks=5, transductive=False)
    changed = evaluate(maml, Changed(), steps=[2], tasks=5, transductive=False)
    assert plain.last.loss.mean == pytest.approx(changed.last.loss.mean, rel=1e-6)


@pytest.mark.parametrize("path", ["reference", "vectorized"])
@pytest.mark.parametrize("transductive", [True, False], ids=["together", "one by one"])
def test_rows_of_weight_zero_might_as_well_not_be_there(path: Any, transductive: bool) -> None:
    """Padding with inputs far off and a label that is none, against the same tasks unpadded."""

    def pad(side: Examples) -> Examples:
        x = torch.cat([side.x, torch.full_like(side.x[:, :2], 100.0)], 1)
        y = torch.cat([side.y, torch.full_like(side.y[:, :2], -1)], 1)
        weight = torch.ones(y.shape)
        weight[:, -2:] = 0.0
        return Examples(x, y, weight)

    class Padded(TaskSource):
        def sample(self, step: int, indices: Any, *, split: str | None = None) -> TaskBatch:
            batch = _classes().sample(step, indices, split=split)
            return TaskBatch(pad(batch.support), pad(batch.query), None, batch.task_id)

    def rows(output: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(output, y, reduction="none")

    maml = _classifier(nn.BatchNorm1d(8, track_running_stats=False))
    maml.loss, maml.path = rows, path
    options: dict[str, Any] = {"steps": 2, "tasks": 5, "transductive": transductive}
    trimmed, padded = evaluate(maml, _classes(), **options), evaluate(maml, Padded(), **options)
    for ours, theirs in zip(padded.results, trimmed.results, strict=True):
        assert ours.loss.mean == pytest.approx(theirs.loss.mean, rel=1e-5)
        assert ours.accuracy is not None
        assert theirs.accuracy is not None
        assert ours.accuracy.mean == pytest.approx(theirs.accuracy.mean)


def test_tasks_that_diverge_are_counted() -> None:
    maml = learner(lr=1e6)
    result = evaluate(maml, Sinusoid(shots=5), steps=[0, 20], tasks=20)
    assert result.results[0].loss.diverged == 0
    assert result.last.loss.diverged > 0
    assert "diverged" in result.table()
    assert result.to_json()["results"][1]["loss"]["mean"] is None


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "steps must be at least 0, got -1", {"steps": -1}),
        (ValueError, "steps must name at least one", {"steps": []}),
        (ValueError, "tasks must be at least 1, got 0", {"tasks": 0}),
        (ValueError, "chunk_size must be at least 1, got 0", {"chunk_size": 0}),
    ],
)
def test_bad_arguments_are_named(
    error: type[Exception], message: str, options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=f"evaluate: {message}"):
        evaluate(learner(), Sinusoid(shots=5), **{"steps": 1, "tasks": 5, **options})


def test_an_algorithm_is_needed() -> None:
    with pytest.raises(TypeError, match="evaluate: algorithm must be an Algorithm"):
        evaluate(nn.Linear(1, 1), Sinusoid(shots=5), steps=1)  # type: ignore[arg-type]


def test_a_loss_per_row_is_its_mean() -> None:
    source = Sinusoid(shots=5)
    scalar = evaluate(learner(), source, steps=1, tasks=5)
    rows = learner(loss=lambda output, y: (output - y).square().mean(-1))
    per_row = evaluate(rows, source, steps=1, tasks=5)
    assert per_row.last.loss.mean == pytest.approx(scalar.last.loss.mean, rel=1e-6)
    assert mse_loss is learner().loss
