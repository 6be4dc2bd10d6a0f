"""Calls of the fused path, drawn by hypothesis: a program, its data, and every way to ask."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta.batch import Examples, TaskBatch
from fastmeta.inner_loop import SGD, MetaGrad, meta_grad
from fastmeta.inner_loop.optimizers import resolve
from fastmeta.program import BatchNorm1d, Flatten, Layer, Linear, Loss, Program, Rows, interpreter
from tests.program.drawing import activations
from tests.tolerances import size

# Widths at, below and above the vectors of every instruction set, and in between.
WIDTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 64, 65, 70)
KINKED = ("relu", "leaky_relu", "elu")
RATE_FORMS = (
    "number",
    "one",
    "per-step",
    "per-element",
    "per-row",
    "per-step-and-element",
)
Params = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One call: all that decides its numbers, and nothing of how it is computed."""

    program: Program
    tasks: int
    support_rows: int
    query_rows: int
    steps: int
    order: Literal[1, 2]
    reduction: Literal["mean", "sum"]
    rates: tuple[tuple[str, str, bool], ...]  # name, form, whether it has a gradient
    one_rate: bool  # a single number for all
    per_task: frozenset[str]
    weights: tuple[bool, bool]
    seed: int

    @property
    def has_batch_norm(self) -> bool:
        return any(node.layer.kind == "batch_norm" for node in self.program.nodes)

    @cached_property
    def inputs(self) -> Inputs:
        """The tensors, in float64, all of them numbers of float32."""
        return _inputs(self)


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case."""

    params: Params
    batch: TaskBatch
    inner: SGD

    def to(self, dtype: torch.dtype) -> Inputs:
        def cast(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.detach().to(dtype).requires_grad_(value.requires_grad)
            return value

        inner: SGD = pytree.tree_map(cast, self.inner)
        return Inputs(
            {name: cast(value) for name, value in self.params.items()},
            self.batch.to(dtype=dtype),
            inner,
        )

    def moved(self, size: float, seed: int) -> Inputs:
        """Every number moved by `size` of itself, up or down by chance."""
        generator = torch.Generator().manual_seed(seed)

        def move(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            signs = torch.randint(0, 2, value.shape, generator=generator).to(value) * 2 - 1
            return (value * (1 + size * signs)).detach().requires_grad_(value.requires_grad)

        inner: SGD = pytree.tree_map(move, self.inner)
        batch: TaskBatch = pytree.tree_map(move, self.batch)
        return Inputs({name: move(value) for name, value in self.params.items()}, batch, inner)


@st.composite
def chains(draw: st.DrawFn, max_linear: int = 4) -> tuple[list[Layer], list[str], int]:
    """Layers, absent parameters, and columns of the input. Elementwise layers stand anywhere."""
    widths = st.sampled_from(WIDTHS)
    features = draw(st.one_of(widths, st.sampled_from((64, 66, 80, 100))))
    layers: list[Layer] = []
    without: list[str] = []
    first = features

    def between(most: int) -> None:
        for _ in range(draw(st.integers(0, most))):
            if draw(st.integers(0, 3)) > 0:
                layers.append(draw(activations()))
                continue
            missing = draw(st.sampled_from(((), ("weight",), ("bias",), ("weight", "bias"))))
            without.extend(f"{len(layers)}.{name}" for name in missing)
            layers.append(BatchNorm1d(features, eps=draw(st.sampled_from((1e-5, 1e-3)))))

    if draw(st.integers(0, 3)) == 0:
        between(2)
    linear = draw(st.integers(1, max_linear))
    for number in range(linear):
        narrow = number == linear - 1 and draw(st.booleans())
        out = draw(st.integers(1, 5) if narrow else widths)
        if draw(st.booleans()):
            without.append(f"{len(layers)}.bias")
        layers.append(Linear(features, out))
        features = out
        if number < linear - 1:
            between(3)
        elif draw(st.integers(0, 3)) == 0:
            between(2)
    return layers, without, first


@st.composite
def wide_chains(draw: st.DrawFn) -> tuple[list[Layer], list[str], int]:
    layers, without, features = draw(chains(2))
    first = draw(st.sampled_from((64, 65, 70, 72, 100)))
    head: list[Layer] = [Linear(first, features)]
    if draw(st.booleans()):
        head.append(draw(activations()))
    shifted = [f"{int(n.split('.')[0]) + len(head)}.{n.split('.')[1]}" for n in without]
    absent = ["0.bias"] if draw(st.booleans()) else []
    return [*head, *layers], [*absent, *shifted], first


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    most_rows: int = 40,
    most_tasks: int = 20,
    most_steps: int = 5,
    max_linear: int = 4,
    wide: bool = False,
) -> Case:
    """A case; `wide`: a first layer so wide, over so few rows, that its weight is never formed."""
    layers, without, features = draw(wide_chains() if wide else chains(max_linear))
    if wide:
        most_rows = features // 2
    input_shape: tuple[int, ...] = (features,)
    if features % 2 == 0 and draw(st.integers(0, 7)) == 0:
        input_shape = (2, features // 2)
        layers.insert(0, Flatten())
        without = [f"{int(n.split('.')[0]) + 1}.{n.split('.')[1]}" for n in without]
    weights = draw(st.tuples(st.booleans(), st.booleans()))
    per_row = any(weights) or draw(st.booleans())
    loss = Loss(
        kind=draw(st.sampled_from(("mse", "cross_entropy"))),
        divisor="rows" if per_row else draw(st.sampled_from(("rows", "one"))),
        factor=draw(st.sampled_from((1.0, 0.5, 0.2))),
        per_row=per_row,
    )
    program = Program.chain(layers, input_shape, loss, without=without)
    names = list(program.params)
    least = 2 if any(isinstance(layer, BatchNorm1d) for layer in layers) else 1
    rows = st.one_of(st.integers(least, min(9, most_rows)), st.integers(least, most_rows))
    steps = draw(st.integers(0, most_steps))

    how = 0 if wide else draw(st.integers(0, 5))
    chosen = names if how < 2 else draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    if how == 2:
        chosen = [n for n in names if n.endswith(".bias")] or chosen
    elif how == 3:
        kept = [n for n in names if isinstance(layers[int(n.split(".")[0])], BatchNorm1d)]
        chosen = kept or chosen
    elif how == 4:
        chosen = names[-1:]
    chosen = [name for name in names if name in chosen]
    forms = st.sampled_from(RATE_FORMS[:3] if wide else RATE_FORMS)
    one_rate = draw(st.booleans())
    rates = tuple(
        (name, draw(forms), draw(st.booleans())) for name in (["*"] if one_rate else chosen)
    )
    if one_rate:  # a single number, or one for each step, for all that adapts
        form = rates[0][1] if rates[0][1] in ("number", "one", "per-step") else "one"
        rates = tuple((name, form, rates[0][2]) for name in chosen)
    per_task = draw(st.lists(st.sampled_from((names[1:] or names) if wide else names), max_size=2))
    return Case(
        program,
        draw(st.one_of(st.integers(1, 9), st.integers(1, most_tasks))),
        draw(rows),
        draw(rows),
        steps,
        draw(st.sampled_from((2, 2, 1))),
        draw(st.sampled_from(("mean", "sum"))),
        rates,
        one_rate,
        frozenset(per_task),
        weights,
        draw(st.integers(0, 2**31)),
    )


def _inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).double()

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).double()

    params = {}
    for name, shape in case.program.params.items():
        fan_in = shape[1] if len(shape) == 2 else 4
        spread = (case.tasks,) if name in case.per_task else ()
        value = draw(*spread, *shape) * (1.2 / fan_in**0.5)
        kind = case.program.nodes[int(name.split(".")[0])].layer.kind
        if kind == "batch_norm" and name.endswith("weight"):
            value = value + 1
        params[name] = value.float().double()

    def side(rows: int, weighted: bool) -> Examples:
        x = draw(case.tasks, rows, *case.program.input_shape)
        if case.program.loss.kind == "mse":  # type: ignore[union-attr]
            y = draw(case.tasks, rows, *case.program.output_shape)
        else:
            y = torch.randint(case.program.output_shape[0], (case.tasks, rows), generator=generator)
        if not weighted:
            return Examples(x, y)
        weight = (uniform(case.tasks, rows) + 0.5).float().double()
        least = 2 if case.has_batch_norm else 1
        for task in range(case.tasks):  # another number of live rows in each task
            masked = int(torch.randint(0, rows - least + 1, (), generator=generator))
            weight[task, torch.randperm(rows, generator=generator)[:masked]] = 0
        dead = weight == 0
        x[dead] = float("nan")  # what stands in a masked row has no influence
        y[dead] = float("nan") if y.is_floating_point() else -100
        return Examples(x, y, weight)

    batch = TaskBatch(
        side(case.support_rows, case.weights[0]), side(case.query_rows, case.weights[1])
    )
    return Inputs(params, batch, SGD(_rates(case, uniform), case.steps, adapt=adapts(case)))


def adapts(case: Case) -> tuple[str, ...]:
    return tuple(name for name, _, _ in case.rates)


def _rates(case: Case, uniform: Any) -> Any:
    # a plain sum over rows has a gradient that is larger by their number
    loss = case.program.loss
    base = 0.04 / (case.support_rows if loss is not None and loss.divisor == "one" else 1)

    def one(name: str, form: str, gradient: bool) -> Any:
        shape = case.program.params[name]
        if form == "number":
            return float(torch.tensor(base * (0.5 + float(uniform()))))
        shapes = {
            "one": (),
            "per-step": (case.steps, *(1,) * len(shape)),
            "per-element": (1, *shape),
            "per-row": (1, shape[0], *(1,) * (len(shape) - 1)),
            "per-step-and-element": (case.steps, *shape),
        }
        value = (base * (0.5 + uniform(*shapes[form]))).float().double()
        return value.requires_grad_(gradient)

    if not case.one_rate:
        return {name: one(name, form, gradient) for name, form, gradient in case.rates}
    rate = one(*case.rates[0])
    return (
        rate.detach().reshape(-1).requires_grad_(rate.requires_grad)
        if (isinstance(rate, Tensor) and rate.ndim)
        else rate
    )


def run(case: Case, path: str, inputs: Inputs | None = None) -> MetaGrad:
    """One path's answer."""
    given = case.inputs if inputs is None else inputs
    return meta_grad(
        case.program,
        given.params,
        given.batch,
        inner=given.inner,
        loss=None,
        order=case.order,
        reduction=case.reduction,
        path=path,  # type: ignore[arg-type]
    )


def groups(result: MetaGrad) -> dict[str, Params]:
    """A result as groups of numbers that are compared with one another."""
    rates = [r for r in pytree.tree_leaves(result.grads.inner) if isinstance(r, Tensor)]
    return {
        "gradients": dict(result.grads.params),
        "rate gradients": dict(zip(map(str, range(len(rates))), rates, strict=True)),
        "losses": {"query": result.losses, "support": result.metrics["support_loss"]},
        "accuracies": {n: v for n, v in result.metrics.items() if n == "accuracy"},
        "adapted": dict(result.adapted),
    }


def sides(case: Case, inputs: Inputs, task: int) -> tuple[Rows, Rows]:
    """A task's rows as the interpreter takes them: masked labels must be in range."""
    made = []
    for examples in (inputs.batch.support, inputs.batch.query):
        x, y = examples.x[task], examples.y[task]
        weight = None if examples.weight is None else examples.weight[task]
        if weight is not None:
            y = torch.where(weight.reshape(-1, *(1,) * (y.ndim - 1)) != 0, y, 0)
        made.append(Rows(x, y, weight))
    return made[0], made[1]


def of_task(case: Case, inputs: Inputs, task: int) -> Params:
    return {n: p[task] if n in case.per_task else p for n, p in inputs.params.items()}


def interpreted(case: Case, inputs: Inputs | None = None) -> dict[str, Params]:
    """The same by the program's interpreter, task by task, with the hand rules."""
    inputs, program = case.inputs if inputs is None else inputs, case.program
    rates = resolve(inputs.inner, program.params).rates
    plain = {n: r.detach() if isinstance(r, Tensor) else r for n, r in rates.items()}
    each = [
        interpreter.meta_gradient(
            program,
            of_task(case, inputs, task),
            *sides(case, inputs, task),
            rates=plain,
            steps=case.steps,
            order=case.order,
        )
        for task in range(case.tasks)
    ]
    scale = 1 / case.tasks if case.reduction == "mean" else 1.0
    grads = {}
    for name in program.params:
        stacked = torch.stack([found.grads[name] for found in each])
        grads[name] = scale * (stacked if name in case.per_task else stacked.sum(0))
    leaves = [leaf for leaf in pytree.tree_leaves(inputs.inner) if isinstance(leaf, Tensor)]
    learned = [leaf for leaf in leaves if leaf.requires_grad]
    moving = [n for n, r in rates.items() if isinstance(r, Tensor) and r.requires_grad]
    rate_grads: tuple[Tensor, ...] = ()
    if learned:
        rate_grads = torch.autograd.grad(
            [rates[n] for n in moving],  # type: ignore[misc]
            learned,
            [scale * torch.stack([found.rates[n] for found in each]).sum(0) for n in moving],
        )
    return {
        "gradients": grads,
        "rate gradients": dict(zip(map(str, range(len(learned))), rate_grads, strict=True)),
        "losses": {
            "query": torch.stack([found.loss for found in each]),
            "support": torch.stack([found.support_losses for found in each]),
        },
        "adapted": {n: torch.stack([found.adapted[n] for found in each]) for n in rates},
    }


def is_tame(want: dict[str, Params]) -> bool:
    """Whether the inner loop goes downhill: one that explodes amplifies every rounding."""
    return size(want["losses"]) < 1e3 and size(want["gradients"]) < 1e4


def signs(case: Case, inputs: Inputs) -> Tensor:
    """Which side of its kink every input of ReLU, LeakyReLU and ELU lies on, at every step."""
    rates = resolve(inputs.inner, case.program.params)
    found = [torch.zeros(0, dtype=torch.bool)]
    for task in range(case.tasks):
        theta = of_task(case, inputs, task)
        support, query = sides(case, inputs, task)
        for step in range(case.steps + 1):
            rows = support if step < case.steps else query
            found += _signs(case.program, theta, rows)
            if step == case.steps:
                break
            grads = interpreter.loss_and_grad(
                case.program, theta, rows.x, rows.y, rows.weight
            ).grads
            moved = {n: theta[n] - rate * grads[n] for n, rate in rates.at(step).items()}
            theta = {n: value.detach() for n, value in {**theta, **moved}.items()}
    return torch.cat(found)


def _signs(program: Program, theta: Params, rows: Rows) -> list[Tensor]:
    mask = None if rows.weight is None else rows.weight != 0
    live = slice(None) if mask is None else mask
    value, found = rows.x, []
    for node in program.nodes:
        if node.layer.kind in KINKED:
            found.append((value[live] > 0).reshape(-1))
        own = [None if n is None else theta[n] for n in node.params]
        value, _ = node.layer.forward(value, own, mask)
    return found
