"""The fast door: the same bits as the long way, and nothing that changed goes through."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmeta.inner_loop import SGD, MetaGrad, door, meta_grad

pytestmark = pytest.mark.needs("cpp")


class Net(nn.Module):
    """A module with all that can change behind a door's back."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.leaky, self.out = nn.Linear(2, 9), nn.LeakyReLU(0.1), nn.Linear(9, 3)
        self.act: Callable[[Tensor], Tensor] = torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.leaky(self.hidden(x))))


def mean_square(output: Tensor, y: Tensor) -> Tensor:
    return ((output - y) ** 2).mean()


def batch() -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    shapes = ((4, 6, 2), (4, 6, 3), (4, 5, 2), (4, 5, 3))
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


def call(net: nn.Module, path: str = "auto", loss: Any = mean_square, lr: float = 0.1) -> MetaGrad:
    return meta_grad(net, None, batch(), inner=SGD(lr=lr, steps=2), loss=loss, path=path)  # type: ignore[arg-type]


def through_the_door(net: nn.Module, loss: Any = mean_square) -> None:
    for _ in range(2):
        last = call(net, loss=loss)
    assert type(last) is door.PreparedMetaGrad, "the second call must go through the door"


def network() -> Net:
    torch.manual_seed(0)
    return Net().double()


def slope(net: Net) -> None:
    net.leaky.negative_slope = 0.7


def activation(net: Net) -> None:
    net.act = torch.sigmoid


def patched(net: Net) -> None:
    net.forward = lambda x: net.out(net.hidden(x))  # type: ignore[method-assign]


def hooked(net: Net) -> None:
    net.hidden.register_forward_hook(lambda module, args, output: 2 * output)


def layer(net: Net) -> None:
    net.hidden = nn.Linear(2, 9).double()


def parameter(net: Net) -> None:
    net.out.weight = nn.Parameter(torch.randn(3, 9, dtype=torch.float64))


def storage(net: Net) -> None:
    net.out.weight.data = torch.randn(3, 9, dtype=torch.float64)


def in_place(net: Net) -> None:
    with torch.no_grad():
        net.out.weight.mul_(3.0)


def same_as_reference(net: nn.Module, loss: Any = mean_square) -> None:
    ours, theirs = call(net, loss=loss), call(net, "reference", loss=loss)
    for name, grad in theirs.grads.params.items():
        torch.testing.assert_close(ours.grads.params[name], grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "change",
    [slope, activation, patched, hooked, layer, parameter, storage, in_place],
    ids=lambda change: change.__name__,
)
def test_what_changed_after_two_calls_counts(change: Callable[[Net], None]) -> None:
    net = network()
    through_the_door(net)
    before = call(net).losses
    change(net)
    same_as_reference(net)
    assert not torch.allclose(call(net).losses, before), "the change must matter"


def test_a_frozen_parameter_loses_its_gradient() -> None:
    net = network()
    through_the_door(net)
    net.hidden.weight.requires_grad_(False)
    assert "hidden.weight" not in call(net).grads.params


def test_a_loss_module_whose_reduction_changed_counts() -> None:
    net, loss = network(), nn.MSELoss()
    through_the_door(net, loss)
    loss.reduction = "sum"
    same_as_reference(net, loss)


def test_a_loss_that_closes_over_a_list_counts_each_time() -> None:
    net, factor = network(), [1.0]

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return factor[0] * mean_square(output, y)

    for value in (1.0, 1.0, 3.0):
        factor[0] = value
        same_as_reference(net, loss)


def test_a_global_hook_counts() -> None:
    net = network()
    through_the_door(net)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: 2 * output if module is net.out else output
    )
    try:
        same_as_reference(net)
    finally:
        handle.remove()


def test_another_rate_is_another_call() -> None:
    net = network()
    through_the_door(net)
    assert not torch.equal(call(net, lr=0.2).losses, call(net).losses)
    torch.testing.assert_close(call(net, lr=0.2).losses, call(net, "reference", lr=0.2).losses)


def test_the_door_gives_the_bits_of_the_long_way() -> None:
    net = network()
    through_the_door(net)
    short = call(net)
    door.forget()
    long = call(net)
    assert type(short) is not type(long)
    assert torch.equal(short.losses, long.losses)
    assert torch.equal(short.metrics["support_loss"], long.metrics["support_loss"])
    for name, grad in long.grads.params.items():
        assert torch.equal(short.grads.params[name], grad)
        assert torch.equal(short.adapted[name], long.adapted[name])
    assert short.grads.inner.lr is None
    assert long.grads.inner.lr is None


def test_a_result_can_be_copied() -> None:
    net = network()
    through_the_door(net)
    result = call(net)
    again = copy.deepcopy(result)
    assert type(again) is MetaGrad
    assert torch.equal(again.losses, result.losses)


def test_the_state_of_a_result_is_its_own() -> None:
    net = network()
    through_the_door(net)
    first = call(net).state
    assert first is not None
    first.step.add_(5)
    state = call(net).state
    assert state is not None
    assert state.step.tolist() == [2, 2, 2, 2]


def test_a_negative_view_is_read_as_its_numbers() -> None:
    net = network()
    x, y, xq, yq = batch()
    inner = SGD(lr=0.1, steps=2)
    plain = [meta_grad(net, None, (x, y, xq, yq), inner=inner, loss=mean_square) for _ in range(2)]
    negative = torch._neg_view(-x)
    for path in ("auto", "fused"):
        found = meta_grad(
            net,
            None,
            (negative, y, xq, yq),
            inner=inner,
            loss=mean_square,
            path=path,  # type: ignore[arg-type]
        )
        assert torch.equal(found.losses, plain[0].losses)


def test_autocast_keeps_out_of_the_executors() -> None:
    net = network().float()
    x, y, xq, yq = (tensor.float() for tensor in batch())
    inner = SGD(lr=0.1)
    for _ in range(2):
        assert meta_grad(net, None, (x, y, xq, yq), inner=inner, loss=mean_square).path == "fused"
    with torch.autocast("cpu", torch.bfloat16):
        found = meta_grad(net, None, (x, y, xq, yq), inner=inner, loss=mean_square)
    assert found.path != "fused"


def test_a_door_keeps_no_module_alive() -> None:
    net = network()
    through_the_door(net)
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None


def test_a_thread_takes_its_doors_with_it() -> None:
    net, seen = network(), []

    def work() -> None:
        through_the_door(net)
        seen.extend(weakref.ref(found) for found in door._doors.of[id(net)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    gc.collect()
    assert seen
    assert all(found() is None for found in seen)
