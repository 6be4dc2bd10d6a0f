"""Bad input at the engine's door: what it must be, what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmeta.batch import Examples, TaskBatch
from fastmeta.inner_loop import SGD, Momentum, OptimizerState, adapt, meta_grad
from fastmeta.program import Linear, Loss, Program
from tests.inner_loop.naive import mse, network, parameters, regression, rowwise

XS, YS, XQ, YQ = regression()
PARAMS = parameters(network())
LABELS = torch.zeros(5, 4, dtype=torch.int64), torch.zeros(5, 6, dtype=torch.int64)
cross_entropy = torch.nn.functional.cross_entropy
LOSS = Loss("mse", divisor="rows", factor=0.5, per_row=False)
PROGRAM = Program.chain([Linear(3, 2)], (3,), LOSS)
LEARNED = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)


def call(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "model": network(),
        "params": None,
        "batch": (XS, YS, XQ, YQ),
        "inner": SGD(0.1, 2),
        "loss": mse,
    }
    return meta_grad(**{**arguments, **changes})


def labelled(support: Any = LABELS[0], query: Any = LABELS[1], **changes: Any) -> Any:
    return {"batch": (XS, support, XQ, query), "loss": cross_entropy, **changes}


def weighted(**changes: Any) -> Any:
    weight = torch.ones(5, 4, dtype=torch.float64)
    return {"batch": TaskBatch(Examples(XS, YS, weight), Examples(XQ, YQ)), **changes}


def indexed(steps: int, query: bool = False) -> TaskBatch:
    index = torch.zeros(5, steps, 2, dtype=torch.int64)
    return TaskBatch(
        Examples(XS, YS, None, index), Examples(XQ, YQ, None, index if query else None)
    )


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "model-kind": ({"model": mse}, TypeError, "model must be an nn.Module or a Program, got"),
    "model-without-parameters": (
        {"model": nn.Tanh()}, ValueError, "model must have a parameter that requires grad"),
    "model-all-frozen": (
        {"model": network().requires_grad_(False)}, ValueError, "that requires grad, got none"),
    "lazy-model": (
        {"model": nn.LazyLinear(2)}, ValueError, "model must have initialised parameters"),
    "inner-kind": ({"inner": 0.1}, TypeError, "inner must be SGD, Momentum or Adam, got 0.1"),
    "params-kind": ({"params": [1]}, TypeError, "params must be a mapping name -> tensor"),
    "params-missing": (
        {"params": {"0.weight": PARAMS["0.weight"]}}, ValueError, "params must have '0.bias'"),
    "params-unknown": (
        {"params": {**PARAMS, "3.weight": torch.ones(1)}}, ValueError,
        r"params must be parameters of the model \('0.weight', .*\), got '3.weight'"),
    "params-shape": (
        {"params": {**PARAMS, "0.bias": torch.ones(3).double()}}, ValueError,
        r"params\['0.bias'\] must have shape \[4\], or \[5, 4\] for each task, got .* \[3\]"),
    "params-no-tensor": (
        {"params": {**PARAMS, "0.bias": 1.0}}, TypeError, r"params\['0.bias'\] must be a tensor"),
    "params-integer": (
        {"params": {**PARAMS, "0.bias": torch.ones(4, dtype=torch.int64)}}, TypeError,
        r"params\['0.bias'\] must be a floating tensor"),
    "params-device": (
        {"params": {**PARAMS, "0.bias": torch.ones(4, device="meta").double()}}, ValueError,
        r"params\['0.bias'\] must be on cpu like the batch, got it on meta"),
    "program-without-params": (
        {"model": PROGRAM, "loss": None}, TypeError, "params must be given with a program"),
    "program-and-a-loss": (
        {"model": PROGRAM, "params": {"0.weight": torch.zeros(2, 3), "0.bias": torch.zeros(2)}},
        TypeError, "loss must be None for a program that has a loss of its own"),
    "batch-kind": ({"batch": 3}, TypeError, "the batch must be a TaskBatch"),
    "batch-empty": (
        {"batch": tuple(v[:0] for v in (XS, YS, XQ, YQ))}, ValueError, "at least one task"),
    "batch-tasks-disagree": (
        {"batch": (XS, YS, XQ[:4], YQ[:4])}, ValueError, "query.x must have 5 tasks"),
    "batch-rank": ({"batch": (XS[:, 0, 0],) * 4}, ValueError, r"shape \[T, S, ...\]"),
    "batch-dtype": (
        {"batch": tuple(v.float() for v in (XS, YS, XQ, YQ))}, TypeError,
        "support.x must be float64 like the parameters, got a float32"),
    "support-and-query-disagree": (
        {"batch": (XS, YS, XQ[..., :2], YQ)}, ValueError, "query.x must have rows of shape"),
    "labels-high": (
        labelled(support=LABELS[0] + 2), ValueError,
        r"support.y must be labels in \[0, 2\), .* got values 2 to 2"),
    "labels-negative": (labelled(query=LABELS[1] - 1), ValueError, "query.y must be labels in"),
    "labels-dtype": (
        labelled(LABELS[0].int(), LABELS[1].int()), TypeError, "support.y must be int64"),
    "rows-of-another-size": (
        {"batch": (XS[..., :2], YS, XQ[..., :2], YQ)}, ValueError,
        r"support.x must be rows that Sequential takes, got a float64 tensor of shape \[4, 2\]"),
    "rows-of-another-rank": (
        {"batch": (XS[..., 0], YS, XQ[..., 0], YQ)}, ValueError,
        "support.x must be rows that Sequential takes"),
    "targets-of-another-size": (
        {"batch": (XS, YS[..., :0], XQ, YQ[..., :0])}, ValueError,
        r"loss must take an output \(.* \[4, 2\]\) and targets \(.* \[4, 0\]\), got RuntimeError"),
    "loss-kind": ({"loss": "mse"}, TypeError, "loss must be a function"),
    "loss-returns-no-tensor": (
        {"loss": lambda o, y: 1.0}, TypeError, "loss must return a tensor, got 1.0"),
    "loss-integer": (
        {"loss": lambda o, y: (o > y).sum()}, TypeError, "loss must return a floating tensor"),
    "loss-no-scalar": (
        {"loss": lambda o, y: (o - y) ** 2}, ValueError,
        r"loss must return a scalar, or one number for each of the 4 rows, got .* \[4, 2\]"),
    "loss-constant": (
        {"loss": lambda o, y: mse(o.detach(), y)}, ValueError,
        "loss must depend on a parameter that adapts"),
    "loss-of-a-weighted-batch": (
        weighted(), ValueError, "loss must return one number for each of the 4 rows, because"),
    "loss-params-kind": ({"loss_params": 3}, TypeError, "loss_params must be a mapping"),
    "loss-params-names": ({"loss_params": {1: 2}}, TypeError, "loss_params must be a mapping"),
    "outer-unknown": ({"outer": "support"}, ValueError, "outer must be one of query, displacement"),
    "outer-implicit": ({"outer": "implicit"}, ValueError, "implicit gradients are yet to come"),
    "outer-kind": ({"outer": 3}, TypeError, "outer must be 'query', 'displacement' or a weight"),
    "outer-count": ({"outer": (1.0,)}, ValueError, "outer must have 2 weights, one per step"),
    "outer-rank": ({"outer": torch.ones(2, 2)}, ValueError, r"outer must have shape \[2\]"),
    "outer-learned": (
        {"outer": torch.ones(2, requires_grad=True)}, ValueError, "outer must be constant weights"),
    "outer-nan": ({"outer": (1.0, float("nan"))}, ValueError, "outer must have finite weights"),
    "displacement-with-a-learned-rate": (
        {"outer": "displacement", "inner": SGD(LEARNED)}, ValueError,
        "inner must be constants with outer='displacement'"),
    "order": ({"order": 3}, ValueError, "order must be 1 or 2, got 3"),
    "order-bool": ({"order": True}, ValueError, "order must be 1 or 2, got True"),
    "reduction": ({"reduction": "max"}, ValueError, "reduction must be one of mean, sum"),
    "reduction-kind": ({"reduction": 1}, TypeError, "reduction must be a string"),
    "path": ({"path": "fast"}, ValueError, "path must be one of auto, fused, vectorized"),
    "path-kind": ({"path": None}, TypeError, "path must be a string, got None"),
    "backend": ({"backend": "gpu"}, ValueError, "backend must be one of auto, reference, cpp"),
    "batch-norm": ({"batch_norm": "eval"}, ValueError, "batch_norm must be one of batch, per_step"),
    "batch-norm-per-step": (
        {"batch_norm": "per_step"}, ValueError, "batch_norm='per_step' is not implemented yet"),
    "transform-kind": ({"task_transform": 3}, TypeError, "task_transform must be a function"),
    "transform-names": (
        {"task_transform": lambda g: {}}, TypeError, "must return gradients of the same names"),
    "transform-shape": (
        {"task_transform": lambda g: {n: v.sum() for n, v in g.items()}}, ValueError,
        r"task_transform must return a gradient of shape \[4, 3\] for '0.weight'"),
    "index-steps": (
        {"batch": indexed(3)}, ValueError, "support.index must have rows for each of the 2 steps"),
    "index-query": ({"batch": indexed(2, query=True)}, ValueError, "query.index must be None"),
    "state-kind": ({"state": {}}, TypeError, "state must be an OptimizerState"),
    "state-names": (
        {"state": OptimizerState(torch.tensor(1), {}, {}), "inner": Momentum()}, ValueError,
        "state.first must have the parameters that adapt"),
    "state-shape": (
        {"state": OptimizerState(torch.tensor([1, 2]), {}, {})}, ValueError,
        r"state.step must have shape \[\] or \[5\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(WRONG))
def test_refused(name: str) -> None:
    changes, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.parametrize("path", ["reference", "vectorized"])
def test_a_loss_of_a_wrong_shape_is_found_on_each_path(path: Any) -> None:
    with pytest.raises(ValueError, match="loss must return a scalar"):
        call(loss=lambda o, y: (o - y) ** 2, path=path)


def test_a_masked_row_may_have_any_label() -> None:
    weight = torch.ones(5, 4).double()
    weight[:, 1] = 0
    y = LABELS[0].clone()
    y[:, 1] = -1

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output, target, reduction="none")

    batch = TaskBatch(Examples(XS, y, weight), Examples(XQ, LABELS[1]))
    for path in ("reference", "vectorized"):
        assert call(batch=batch, loss=loss, path=path).losses.isfinite().all()


def test_integers_that_are_no_labels() -> None:
    """A count regression: y is [T, S, C], so its integers are not compared with classes."""
    counts = (torch.full((5, 4, 2), 9), torch.full((5, 6, 2), 9))
    result = call(batch=(XS, counts[0], XQ, counts[1]), loss=lambda o, y: mse(o, y.double()))
    assert "accuracy" not in result.metrics


def test_inputs_of_several_tensors_reach_forward_by_position_or_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.left(a) - 2 * self.right(b)

    net = Two().double()
    for x, q in (((XS, XS), (XQ, XQ)), ({"b": XS, "a": XS}, {"b": XQ, "a": XQ})):
        for path in ("reference", "vectorized"):
            result = call(model=net, batch=(x, YS, q, YQ), path=path)
            grads = result.grads.params
            assert not torch.allclose(grads["left.weight"], grads["right.weight"])


@pytest.mark.parametrize(
    ("support", "error", "message"),
    [
        (3, TypeError, r"support must be Examples or a pair \(x, y\), got 3"),
        ((XS, YS, XQ), TypeError, "support must be Examples or a pair"),
        ((XS, YS[:3]), ValueError, "support.y must have 5 tasks"),
    ],
)
def test_adapt_refuses(support: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        adapt(network(), None, support, inner=SGD(0.1), loss=rowwise)
