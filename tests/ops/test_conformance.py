"""Every operation through the same checks; `conformance.py` has the table."""

from __future__ import annotations

import importlib
import pkgutil
import re
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmeta.ops
from fastmeta.ops.executor import LayerCode, ParamCode, Spec
from tests.ops.conformance import CASES, Case, Sizes, Tensors
from tests.tolerances import EXACT, FLOAT32, FLOAT64, assert_close

pytestmark = pytest.mark.needs("cpp")

OUR_WARNINGS = "ignore:.*torch.jit.script.*:DeprecationWarning"
each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
differentiable = pytest.mark.parametrize(
    "case", [case for case in CASES if case.inputs], ids=lambda case: case.name
)
WIDTHS = (1, 2, 3, 5, 15, 16, 17, 31, 33)


def sample(case: Case, dtype: torch.dtype = torch.float64, **sizes: Any) -> tuple[Any, Tensors]:
    return case.sample(Sizes(**sizes), dtype)


def with_grad(case: Case, tensors: Tensors) -> Tensors:
    return {
        name: value.detach().clone().requires_grad_() if name in case.inputs else value
        for name, value in tensors.items()
    }


def of_inputs(case: Case, spec: Any, tensors: Tensors) -> tuple[Any, tuple[Tensor, ...]]:
    """The operation as a function of its differentiable inputs alone, and those."""
    names = [name for name in case.inputs if name in tensors]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        out = case.call(spec, {**tensors, **dict(zip(names, values, strict=True))})
        return tuple(value for value in out.values() if value.requires_grad)

    return function, tuple(tensors[name].detach().clone().requires_grad_() for name in names)


def test_every_operation_is_in_the_table() -> None:
    """Whatever has a reference beside it, and every registered operator, is a case."""
    named = {case.name for case in CASES}
    for found in pkgutil.iter_modules(fastmeta.ops.__path__):
        module = importlib.import_module(f"fastmeta.ops.{found.name}")
        for name in module.__all__:
            if name.endswith("_reference"):
                assert name.removesuffix("_reference") in named
    registered = {
        str(schema).partition("(")[0].removeprefix("fastmeta::")
        for schema in torch._C._jit_get_all_schemas()
        if str(schema).startswith("fastmeta::")
    }
    assert registered <= named
    assert registered


@each
@pytest.mark.parametrize("labels", [False, True], ids=["mse", "cross-entropy"])
@pytest.mark.parametrize("width", WIDTHS)
def test_forward(case: Case, width: int, labels: bool) -> None:
    spec, tensors = sample(case, width=width, labels=labels)
    want = {n: v.detach() for n, v in case.reference(spec, tensors).items()}
    got = case.call(spec, tensors)
    assert_close(got, want, FLOAT64, "float64")
    spec, single = sample(case, torch.float32, width=width, labels=labels)
    got = case.call(spec, single)
    assert all(value.dtype == torch.float32 for value in got.values())
    rounded = {n: v.double() if v.is_floating_point() else v for n, v in single.items()}
    want = {n: v.detach() for n, v in case.reference(spec, rounded).items()}
    assert_close(got, want, FLOAT32, "float32")


@each
@pytest.mark.parametrize(
    "sizes",
    [{"steps": 0}, {"tasks": 1}, {"rows": 2, "queries": 3}, {"tasks": 17, "rows": 33}],
    ids=["no-steps", "one-task", "few-rows", "many"],
)
def test_sizes(case: Case, sizes: dict[str, int]) -> None:
    spec, tensors = sample(case, **sizes)
    want = {n: v.detach() for n, v in case.reference(spec, tensors).items()}
    assert_close(case.call(spec, tensors), want, FLOAT64, str(sizes))


@differentiable
@pytest.mark.parametrize("labels", [False, True], ids=["mse", "cross-entropy"])
def test_gradcheck(case: Case, labels: bool) -> None:
    spec, tensors = sample(case, width=3, tasks=2, labels=labels)
    function, inputs = of_inputs(case, spec, tensors)
    assert torch.autograd.gradcheck(function, inputs)


@differentiable
@pytest.mark.parametrize("width", [3, 17])
def test_gradient_is_the_references(case: Case, width: int) -> None:
    spec, tensors = sample(case, width=width)
    found = []
    for call in (case.call, case.reference):
        leaves = with_grad(case, tensors)
        generator = torch.Generator().manual_seed(3)
        total = torch.zeros((), dtype=torch.float64)
        for value in call(spec, leaves).values():
            if value.requires_grad:
                cotangent = torch.randn(value.shape, generator=generator, dtype=value.dtype)
                total = total + (cotangent * value).sum()
        names = [name for name in case.inputs if name in leaves]
        grads = torch.autograd.grad(total, [leaves[n] for n in names], materialize_grads=True)
        found.append(dict(zip(names, grads, strict=True)))
    assert_close(*found, FLOAT64, "gradients")


@differentiable
def test_a_second_derivative_is_refused_by_name(case: Case) -> None:
    spec, tensors = sample(case, width=3, tasks=2)
    function, inputs = of_inputs(case, spec, tensors)
    value = sum(out.square().sum() for out in function(*inputs))
    grads = torch.autograd.grad(value, inputs, create_graph=True)
    for grad in grads:
        assert grad.requires_grad, "a gradient that looks like a constant"
        with pytest.raises(RuntimeError, match=r"program_\w+: .* cannot be differentiated again"):
            torch.autograd.grad(grad.sum(), inputs, retain_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.gradgradcheck(function, inputs)


@each
def test_operator(case: Case) -> None:
    spec, tensors = sample(case, width=3)
    operator, arguments = case.operator(spec, tensors)
    torch.library.opcheck(operator, arguments)
    # and once more with tensors that require grad: it must not answer with a silent nothing
    spec, leaves = sample(case, width=3)
    leaves["params[0]"] = leaves["params[0]"].requires_grad_()
    operator, arguments = case.operator(spec, leaves)
    out = operator(*arguments)
    first = next(v for v in torch.utils._pytree.tree_leaves(out) if isinstance(v, Tensor))
    with pytest.raises(RuntimeError, match="operator has no derivative"):
        first.sum().backward()


@each
def test_func_grad(case: Case) -> None:
    spec, tensors = sample(case, width=3)
    name = "params[0]"

    def total(value: Tensor) -> Tensor:
        out = case.call(spec, {**tensors, name: value})
        return torch.stack([v.sum() for n, v in out.items() if n != "losses"]).sum()

    if not case.inputs:
        with pytest.raises(RuntimeError, match=r"program_meta_grad: tensors must have memory"):
            torch.func.grad(total)(tensors[name])
        return

    def reference(value: Tensor) -> Tensor:
        out = case.reference(spec, {**tensors, name: value})
        return torch.stack([v.sum() for n, v in out.items() if n != "losses"]).sum()

    leaf = tensors[name].clone().requires_grad_()
    (want,) = torch.autograd.grad(reference(leaf), leaf)
    got = torch.func.grad(total)(tensors[name])
    assert_close({name: got}, {name: want}, FLOAT64, "torch.func.grad")
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.func.grad(lambda v: torch.func.grad(total)(v).sum())(tensors[name])


@each
def test_vmap(case: Case) -> None:
    spec, tensors = sample(case, width=3)
    name = case.batched or "params[0]"
    several = torch.stack([tensors[name] * (1 + 0.1 * i) for i in range(3)])

    def call(value: Tensor) -> Tensors:
        return case.call(spec, {**tensors, name: value})

    if not case.batched:
        with pytest.raises(RuntimeError, match=r"program_meta_grad: tensors must have memory"):
            torch.func.vmap(call)(several)
        return
    got = torch.func.vmap(call)(several)
    alone = [call(value) for value in several]
    want = {n: torch.stack([one[n] for one in alone]) for n in alone[0]}
    assert_close(got, want, EXACT, "vmap against calls one by one")
    moved = torch.func.vmap(call, in_dims=-1)(several.movedim(0, -1))
    assert_close(moved, want, EXACT, "vmap over the last axis")

    def gradient(value: Tensor) -> Tensor:
        return torch.func.grad(lambda v: torch.stack([o.sum() for o in call(v).values()]).sum())(
            value
        )

    grads = torch.func.vmap(gradient)(several)
    one_by_one = torch.stack([gradient(value) for value in several])
    assert_close({name: grads}, {name: one_by_one}, EXACT, "vmap of the gradient")


@each
def test_under_torch_compile(case: Case) -> None:
    """A graph break that runs the same kernel: the same bits; with fullgraph an error."""
    spec, tensors = sample(case, torch.float32, width=3)

    def twice(value: Tensor) -> Tensors:
        scaled = value * 2.0
        return {n: v + 1.0 for n, v in case.call(spec, {**tensors, "params[0]": scaled}).items()}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's own, about itself
        torch.compiler.reset()
        compiled = torch.compile(twice, backend="eager")
        leaves = [tensors["params[0]"].clone().requires_grad_(bool(case.inputs)) for _ in "ab"]
        got, want = compiled(leaves[0]), twice(leaves[1])
        assert_close(got, want, EXACT, "compiled against eager")
        if case.inputs:
            for out in (got, want):
                sum(v.sum() for v in out.values() if v.requires_grad).backward()  # type: ignore[union-attr]
            ours, theirs = ({"grad": leaf.grad} for leaf in leaves)
            assert_close(ours, theirs, EXACT, "gradient")  # type: ignore[arg-type]
        torch.compiler.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match=case.name):
            torch.compile(twice, backend="eager", fullgraph=True)(leaves[0])


@each
def test_strides_do_not_matter(case: Case) -> None:
    spec, tensors = sample(case)

    def strided(value: Tensor) -> Tensor:
        wide = torch.stack([value, torch.full_like(value, 77)], dim=-1)[..., 0]
        return wide.movedim(0, -1).contiguous().movedim(-1, 0) if value.ndim > 1 else wide

    views = {name: strided(value) for name, value in tensors.items()}
    assert any(not value.is_contiguous() for value in views.values())
    assert_close(case.call(spec, views), case.call(spec, tensors), EXACT, "strided")
    shared = {n: v[:1].expand_as(v) if "params[4]" in n else v for n, v in tensors.items()}
    copied = {name: value.contiguous() for name, value in shared.items()}
    assert_close(case.call(spec, shared), case.call(spec, copied), EXACT, "expanded")


@each
def test_inputs_are_not_written(case: Case) -> None:
    spec, tensors = sample(case)
    before = {name: value.clone() for name, value in tensors.items()}
    case.call(spec, tensors)
    assert_close(tensors, before, EXACT, "inputs")


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_every_output_is_written(case: Case, dtype: torch.dtype) -> None:
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert torch.are_deterministic_algorithms_enabled()
    assert bool(torch.empty(9).isnan().all()), "memory of torch.empty is not filled"
    for sizes in ({}, {"steps": 0}, {"width": 17, "tasks": 9}, {"labels": True}):
        spec, tensors = sample(case, dtype, **sizes)
        for name, value in case.call(spec, tensors).items():
            assert bool(value.isfinite().all()), f"{name} at {sizes}"


@each
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e3, 1e15], ids=str)
def test_magnitudes(case: Case, scale: float) -> None:
    spec, tensors = sample(case, labels=True)
    tensors["support.x"] = tensors["support.x"] * scale
    want = {n: v.detach() for n, v in case.reference(spec, tensors).items()}
    assert_close(case.call(spec, tensors), want, FLOAT64, f"scale {scale}")


@each
@pytest.mark.parametrize("name", ["support.x", "params[0]", "rates[0]", "query.x", "query.weight"])
def test_nan_in_is_nan_out(case: Case, name: str) -> None:
    spec, tensors = sample(case)
    if name not in tensors:
        assert case.name == "program_adapt"
        return
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] = float("nan")
    if name == "rates[0]":
        tensors["rates[1]"] = tensors[name]
    got, want = case.call(spec, tensors), case.reference(spec, tensors)
    for output, value in want.items():
        assert bool(got[output].isnan().any()) or not bool(value.isnan().any()), output
        if "losses" in output or output == "value":
            assert torch.equal(got[output].isnan(), value.isnan()), output


# ---- refusals


def change(value: Tensor, how: str) -> Any:
    return {
        "a list": lambda: value.tolist(),
        "None": lambda: None,
        "half": lambda: value.half() if value.is_floating_point() else value.int(),
        "other-float": lambda: value.to(torch.float32),
        "integers": lambda: value.long() if value.is_floating_point() else value.double(),
        "meta": lambda: value.to("meta"),
        "sparse": lambda: value.to_sparse(),
        "an axis more": lambda: value[..., None, None].expand(*value.shape, 2, 2),
        "one row less": lambda: value[..., :-1] if value.shape[-1] > 1 else value[..., :0],
        "scalar": lambda: value.flatten()[0],
    }[how]()


REFUSED: dict[str, type[Exception]] = {
    "a list": TypeError,
    "None": TypeError,
    "half": TypeError,
    "other-float": TypeError,
    "integers": TypeError,
    "meta": ValueError,
    "sparse": TypeError,
    "an axis more": ValueError,
    "one row less": ValueError,
    "scalar": ValueError,
}


@each
@pytest.mark.parametrize("how", list(REFUSED))
def test_wrong_tensors_are_refused_by_name(case: Case, how: str) -> None:
    spec, tensors = sample(case)
    for name, value in tensors.items():
        if name == "rates[1]":  # the same tensor as rates[0]
            continue
        if how == "None" and (name.startswith("rates") or name.endswith("weight")):
            continue
        bad: dict[str, Any] = {**tensors, name: change(value, how)}
        named = "support.x" if name.endswith("x") and how == "scalar" else name
        with pytest.raises((TypeError, ValueError)) as caught:
            case.call(spec, bad)
        message = str(caught.value)
        assert re.match(r"\w+: .+ must .+, got .+", message), message
        operation = message.partition(":")[0]
        assert operation in ("program_meta_grad", "program_adapt")
        # an x of another dtype than the parameters is a disagreement: any of them may be named
        if name != "support.x":
            assert named in message or "x must" in message, f"{name}: {message}"
            assert isinstance(caught.value, REFUSED[how]), f"{name}: {message}"


@each
def test_a_missing_rate_is_refused(case: Case) -> None:
    spec, tensors = sample(case)
    del tensors["rates[2]"]
    with pytest.raises(ValueError, match=r"rates\[2\] must be given for a parameter that adapts"):
        case.call(spec, tensors)
    spec, tensors = sample(case)
    tensors["rates[3]"] = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"rates\[3\] must .* None for any other"):
        case.call(spec, tensors)


@each
@pytest.mark.parametrize("sizes", [{"tasks": 0}, {"rows": 0}], ids=["tasks", "rows"])
def test_an_empty_batch_is_refused(case: Case, sizes: dict[str, int]) -> None:
    spec, tensors = sample(case, **sizes)
    with pytest.raises(ValueError, match=r"support.x must hold at least one task and one row"):
        case.call(spec, tensors)


@each
def test_labels_out_of_range_are_refused(case: Case) -> None:
    for label in (-1, 3, 2**40):
        spec, tensors = sample(case, labels=True)
        tensors["support.y"][1, 2] = label
        with pytest.raises(
            ValueError, match=rf"support.y must hold labels .* got {label} in task 1"
        ):
            case.call(spec, tensors)
    if "query.y" in tensors:
        spec, tensors = sample(case, labels=True)
        tensors["query.y"][:, 1] = -100  # of weight zero
        case.call(spec, tensors)
        tensors["query.weight"][2] = 0
        with pytest.raises(ValueError, match=r"query.weight must leave a row to every task"):
            case.call(spec, tensors)


@differentiable
@pytest.mark.parametrize("name", ["support.x", "support.y", "rates[5]"])
def test_a_graph_that_would_end_here_is_refused(case: Case, name: str) -> None:
    spec, tensors = sample(case)
    tensors[name] = tensors[name].requires_grad_()
    with pytest.raises(ValueError, match="must not require grad") as caught:
        case.call(spec, tensors)
    assert name in str(caught.value)
    with torch.no_grad():
        case.call(spec, tensors)


LINEAR = LayerCode("linear", 4, 3, 0, 1)
WEIGHT, BIAS = ParamCode(3, 4, True), ParamCode(1, 3, False)
SOUND = Spec((LINEAR,), (WEIGHT, BIAS), "mse", True, 1.0, support_rows=2, query_rows=2, steps=1)
FAULTS: dict[str, tuple[Spec, str]] = {
    "no-layers": (replace(SOUND, layers=()), "layers"),
    "index-beyond": (replace(SOUND, layers=(LINEAR._replace(weight=5),)), r"layers\[0\]"),
    "two-layers-one-weight": (
        replace(SOUND, layers=(LayerCode("linear", 3, 3, 0, 1), LayerCode("linear", 3, 3, 0))),
        r"layers\[1\]",
    ),
    "unused-parameter": (replace(SOUND, layers=(LINEAR._replace(bias=-1),)), r"params\[1\]"),
    "wrong-shape": (replace(SOUND, params=(ParamCode(4, 3, True), BIAS)), r"params\[0\]"),
    "no-weight": (replace(SOUND, layers=(LINEAR._replace(weight=-1),)), "weight"),
    "columns-that-do-not-fit": (
        replace(SOUND, layers=(LINEAR, LayerCode("tanh", 7, 7))),
        r"layers\[1\]",
    ),
    "unknown-layer": (replace(SOUND, layers=(LINEAR, LayerCode("softmax", 3, 3))), "softmax"),
    "negative-slope": (
        replace(SOUND, layers=(LINEAR, LayerCode("leaky_relu", 3, 3, constant=-0.1))),
        "slope",
    ),
    "unknown-loss": (replace(SOUND, loss="hinge"), "loss"),
    "infinite-factor": (replace(SOUND, factor=float("inf")), "factor"),
    "negative-steps": (replace(SOUND, steps=-1), "steps"),
    "owner-later": (
        replace(SOUND, params=(WEIGHT._replace(rate_gradient=True, rate_owner=1), BIAS)),
        r"params\[0\]",
    ),
}


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_spec_that_is_no_program_is_refused(name: str) -> None:
    from fastmeta.ops.executor import executor_of

    executor_of(SOUND, torch.float32)
    spec, words = FAULTS[name]
    with pytest.raises(ValueError, match=rf"spec\..*{words}|{words}"):
        executor_of(spec, torch.float32)


def test_a_spec_survives_its_text() -> None:
    for case in CASES:
        spec, _ = sample(case)
        assert Spec.from_json(spec.to_json()) == spec
