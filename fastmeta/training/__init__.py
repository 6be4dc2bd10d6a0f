"""The training loop and what stands around it: checkpoints, evaluation, metrics, reports."""

from __future__ import annotations

from fastmeta.training.checkpoint import (
    Checkpoint,
    CheckpointFolder,
    CheckpointWarning,
    DamagedCheckpoint,
    read_checkpoint,
)
from fastmeta.training.evaluation import Evaluation, StepResult, evaluate
from fastmeta.training.loop import NonFiniteLoss, TrainResult, train
from fastmeta.training.metrics import MetricsFile, read_metrics
from fastmeta.training.report import Report, Target, write_report
from fastmeta.training.statistics import Summary, summarize

__all__ = [
    "Checkpoint",
    "CheckpointFolder",
    "CheckpointWarning",
    "DamagedCheckpoint",
    "Evaluation",
    "MetricsFile",
    "NonFiniteLoss",
    "Report",
    "StepResult",
    "Summary",
    "Target",
    "TrainResult",
    "evaluate",
    "read_checkpoint",
    "read_metrics",
    "summarize",
    "train",
    "write_report",
]
