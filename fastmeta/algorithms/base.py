"""What every algorithm that learns from batches of tasks has in common."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta._checks import positive_int
from fastmeta.batch import BatchLike, Examples, TaskBatch
from fastmeta.inner_loop.adapt import Adapted
from fastmeta.inner_loop.reduction import TreeReducer, chunk_of
from fastmeta.inner_loop.result import MetaGrad


class Algorithm(nn.Module, abc.ABC):
    """A meta-learning algorithm: three verbs over the engine's one function.

    A subclass says how one chunk of tasks becomes a :class:`~fastmeta.MetaGrad`
    (:meth:`chunk_gradient`) and how a support set becomes adapted learners (:meth:`adapt`).
    Everything else, the training loop and the evaluation among it, uses only the verbs.

    Its parameters are the meta-parameters: an ordinary ``torch.optim`` optimizer takes
    ``algorithm.parameters()``.

    Attributes:
        loss: ``loss(output, y)`` of one task, a scalar or one number per row.
    """

    loss: Callable[..., Tensor]

    @abc.abstractmethod
    def meta_parameters(self) -> dict[str, Tensor]:
        """The tensors that get a meta-gradient, by their names in this module."""

    @abc.abstractmethod
    def chunk_gradient(
        self, batch: TaskBatch, meta_parameters: Mapping[str, Tensor] | None
    ) -> MetaGrad:
        """The engine's answer for one chunk of tasks, summed over its tasks.

        Args:
            batch: the chunk, t tasks.
            meta_parameters: the tensors to use in place of the module's own, by name; None for
                the module's own.
        """

    @abc.abstractmethod
    def gradients(self, result: MetaGrad) -> dict[str, Tensor]:
        """The gradients of a result, under the names of :meth:`meta_parameters`."""

    @abc.abstractmethod
    def adapt(self, support: Examples | tuple[Any, Any], steps: int | None = None) -> Adapted:
        """Learners adapted to each task's support set."""

    def settings(self) -> dict[str, Any]:
        """What, beside the parameters, decides this algorithm's numbers; plain values."""
        return {"algorithm": type(self).__name__}

    def round_chunk(self, size: int) -> int:
        """The chunk size that is used where ``size`` is asked for."""
        return chunk_of(size)

    def meta_gradient(
        self, batch: TaskBatch | BatchLike, chunk_size: int | None = None
    ) -> dict[str, Tensor]:
        """Leave the meta-gradient, a mean over tasks, in ``.grad``, and say how the tasks went.

        Like ``loss.backward()`` it adds to a ``.grad`` that is there, so ``zero_grad`` first, and
        gradient clipping, ``GradScaler`` and data parallelism work as after a ``backward``. The
        mean is over all tasks, however they are cut into chunks: chunks are summed in the fixed
        tree of the whole batch (:mod:`fastmeta.inner_loop.reduction`) and divided by T once, so
        on the ``fused`` path a chunk size changes the memory and not one bit of the gradient.

        Args:
            batch: T tasks, a :class:`~fastmeta.TaskBatch` or tuples of tensors.
            chunk_size: tasks to hold at once; None for all. It is rounded to a subtree of the
                tree of sums: down to a power of two of leaves, and up to one leaf.

        Returns:
            ``loss`` ``[]``, the mean query loss; ``losses`` ``[T]``; ``support_loss`` ``[T, I]``,
            before each inner step; ``accuracy`` ``[T]`` where the targets are classes. Detached.

        Raises:
            TypeError, ValueError: the batch, the model or the loss is not what it must be.

        Example:
            >>> import torch
            >>> from fastmeta import MAML
            >>> maml = MAML(torch.nn.Linear(1, 1), loss=torch.nn.functional.mse_loss)
            >>> x, y = torch.randn(4, 5, 1), torch.randn(4, 5, 1)
            >>> metrics = maml.meta_gradient((x, y, x, y))
            >>> maml.model.weight.grad.shape, metrics["losses"].shape
            (torch.Size([1, 1]), torch.Size([4]))
        """
        tensors = self.meta_parameters()
        gradients, metrics = self.mean_gradients(TaskBatch.of(batch), None, chunk_size)
        for name, gradient in gradients.items():
            tensor = tensors[name]
            if tensor.grad is None:
                tensor.grad = gradient
            else:
                tensor.grad.add_(gradient)
        return metrics

    def mean_gradients(
        self,
        batch: TaskBatch,
        meta_parameters: Mapping[str, Tensor] | None = None,
        chunk_size: int | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The mean meta-gradient by name, and the metrics, without touching ``.grad``.

        Args:
            batch: T tasks, checked.
            meta_parameters: the tensors to use in place of the module's own, by name; None for
                the module's own.
            chunk_size: as in :meth:`meta_gradient`.
        """
        T = batch.num_tasks
        size = T if chunk_size is None else positive_int("meta_gradient", "chunk_size", chunk_size)
        if size < T:
            size = self.round_chunk(size)
        reducer, names = TreeReducer(), []
        parts: list[dict[str, Tensor]] = []
        for chunk in batch.chunks(size) if size < T else (batch,):
            result = self.chunk_gradient(chunk, meta_parameters)
            gradients = self.gradients(result)
            names = list(gradients)
            reducer.push([gradient.detach() for gradient in gradients.values()], chunk.num_tasks)
            parts.append({"losses": result.losses, **result.metrics})
        means = [total / T for total in reducer.total()]
        if len(parts) == 1:
            metrics = {name: value.detach() for name, value in parts[0].items()}
        else:
            metrics = {
                name: torch.cat([part[name].detach() for part in parts]) for name in parts[0]
            }
        metrics = {"loss": metrics["losses"].mean(), **metrics}
        return dict(zip(names, means, strict=True)), metrics

    def forward(self, batch: TaskBatch | BatchLike) -> Tensor:
        """The meta-objective as an ordinary differentiable number.

        ``algorithm(batch).backward()`` leaves the same bits in ``.grad`` as
        ``algorithm.meta_gradient(batch)``: both are one call of the engine. The gradient is
        computed in the forward pass, so use this where the number has to be combined with
        others, and :meth:`meta_gradient` otherwise.

        Args:
            batch: T tasks, a :class:`~fastmeta.TaskBatch` or tuples of tensors.

        Returns:
            ``[]``, the mean query loss after adaptation. It can be differentiated once; a second
            time raises ``RuntimeError``.

        Example:
            >>> import torch
            >>> from fastmeta import MAML
            >>> maml = MAML(torch.nn.Linear(1, 1), loss=torch.nn.functional.mse_loss)
            >>> x, y = torch.randn(4, 5, 1), torch.randn(4, 5, 1)
            >>> maml((x, y, x, y)).backward()
        """
        tensors = self.meta_parameters()
        checked = TaskBatch.of(batch)
        values = tensors.values()
        loss, *_ = _Objective.apply(self, checked, tuple(tensors), *values)  # type: ignore[no-untyped-call]
        result: Tensor = loss
        return result


class _Objective(torch.autograd.Function):
    """The mean loss and, computed with it, its gradients."""

    @staticmethod
    def forward(
        algorithm: Algorithm, batch: TaskBatch, names: tuple[str, ...], *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        given = dict(zip(names, tensors, strict=True))
        with torch.enable_grad():
            gradients, metrics = algorithm.mean_gradients(batch, given)
        return metrics["loss"], *(gradients.get(name) for name in names)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        gradients = output[1:]
        ctx.mark_non_differentiable(*(item for item in gradients if item is not None))
        ctx.save_for_backward(*gradients, *inputs[3:])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
        scaled = _Scaled.apply(upstream, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return None, None, None, *scaled


class _Scaled(torch.autograd.Function):
    """``upstream * gradients``; it takes the tensors too, so that a second derivative ends here.

    Without them the gradients would look like constants, and a penalty on the meta-gradient would
    silently train nothing.
    """

    @staticmethod
    def forward(upstream: Tensor, *saved: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = saved[: len(saved) // 2]
        return tuple(None if item is None else upstream * item for item in gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "forward: the meta-objective must be differentiated once, got a second time; "
            "adapt() returns adapted parameters that can be differentiated again"
        )
