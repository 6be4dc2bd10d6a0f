"""First-order model-agnostic meta-learning."""

from __future__ import annotations

from typing import Any

from fastmeta.algorithms.maml import MAML


class FOMAML(MAML):
    """MAML with first-order gradients: inner gradients are constants.

    The meta-gradient of a task is ``grad L_query(theta_I)``, taken at the adapted parameters and
    applied to the initial ones: the Hessian terms of :class:`~fastmeta.MAML` are dropped.

    Args:
        *args: as for :class:`~fastmeta.MAML`.
        **kwargs: as for :class:`~fastmeta.MAML`, without ``order``.

    Raises:
        TypeError: ``order`` is given.

    Example:
        >>> import torch
        >>> from fastmeta import FOMAML
        >>> FOMAML(torch.nn.Linear(1, 1), loss=torch.nn.functional.mse_loss).order
        1

    Reference:
        Finn, Abbeel, Levine (2017), section 5.2, "first-order approximation".
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, order=1, **kwargs)
