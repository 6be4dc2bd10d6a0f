"""Commands, options, and errors without a traceback."""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import TextIO

import torch

from fastmeta._version import __version__
from fastmeta.cli import doctor
from fastmeta.recipes.run import RECIPES, evaluate_run, run
from fastmeta.training import CheckpointWarning, NonFiniteLoss

_BAD_INPUT = (ValueError, TypeError, OSError, ImportError)

_EXAMPLES = """\
examples:
  fastmeta train maml-sinusoid                          5,000 iterations, 5-shot
  fastmeta train maml-sinusoid --preset full --shots 10
  fastmeta train maml-omniglot --data-root ~/data --network mlp --shots 5
  fastmeta train maml-omniglot --network conv --preset full --max-seconds 1800
  fastmeta train maml-sinusoid --out runs/a --resume    go on where runs/a stands
  fastmeta evaluate runs/a
  fastmeta doctor
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after ``fastmeta``; those of the process when None.

    Returns:
        The exit status: 0 done, 1 the run failed, 2 bad input, 130 or 143 interrupted.
    """
    options = _parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.simplefilter("always", CheckpointWarning)
        try:
            status: int = options.command(options)
            return status
        except KeyboardInterrupt:
            _say("interrupted")
            return 130
        except Exception as error:
            if options.debug:
                traceback.print_exc()
                return 1
            if isinstance(error, _BAD_INPUT):
                _say(f"error: {error}")
                return 1 if isinstance(error, NonFiniteLoss) else 2
            _say(f"failed: {type(error).__name__}: {error} (--debug shows where)")
            return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastmeta",
        description="Meta-learning on hand-written kernels.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastmeta {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    machine = argparse.ArgumentParser(add_help=False)
    machine.add_argument(
        "--data-root", metavar="DIR", help="where data sets lie (default: $FASTMETA_DATA)"
    )
    machine.add_argument("--threads", type=_at_least(1), metavar="N", help="CPU threads")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        parents=[common, machine],
        help="meta-train a recipe, evaluate it, write its report",
        description="Meta-train a recipe into a folder, evaluate it on held-out tasks, report it.\n"
        + "\n".join(f"  {name:<16} {kind.summary}" for name, kind in RECIPES.items()),
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("recipe", choices=sorted(RECIPES), help="what to train")
    train.add_argument("--preset", default="short", help="short (default) or full, as published")
    train.add_argument("--shots", type=int, metavar="K", help="support examples of a class")
    train.add_argument("--ways", type=int, metavar="N", help="classes of a task")
    train.add_argument("--network", help="mlp or conv (maml-omniglot)")
    train.add_argument("--iterations", type=int, metavar="N", help="in place of the preset's")
    train.add_argument("--meta-batch", type=int, metavar="T", help="tasks of an iteration")
    train.add_argument("--inner-lr", type=float, metavar="RATE", help="inner rate alpha")
    train.add_argument("--tasks", type=int, metavar="T", help="held-out tasks to evaluate on")
    train.add_argument("--seed", type=int, help="of tasks and initial parameters (default: 0)")
    train.add_argument("--path", help="auto, fused, vectorized or reference")
    train.add_argument("--chunk-size", type=int, metavar="T", help="tasks to hold at once")
    train.add_argument("--out", metavar="DIR", help="the run's folder (default: runs/...)")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    train.add_argument("--max-seconds", type=float, metavar="S", help="end the training cleanly")
    train.add_argument(
        "--validate-every", type=int, metavar="N", help="validate, and keep the best checkpoint"
    )
    train.add_argument("--quiet", action="store_true", help="no progress")
    train.set_defaults(command=_train)

    evaluate = commands.add_parser(
        "evaluate",
        parents=[common, machine],
        help="evaluate a run's newest checkpoint on held-out tasks",
        description="Evaluate a run's newest checkpoint on held-out tasks, and report it anew.",
        epilog="example:\n  fastmeta evaluate runs/a --tasks 2000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("run", metavar="RUN_DIR", help="the folder that train wrote")
    evaluate.add_argument("--best", action="store_true", help="the best checkpoint on validation")
    evaluate.add_argument("--tasks", type=int, metavar="T", help="in place of the recipe's number")
    evaluate.set_defaults(command=_evaluate)

    examine = commands.add_parser(
        "doctor",
        parents=[common],
        help="what is installed, what runs here, and why not",
        description="Print versions, instruction set, threads, backends with reasons, data found.",
    )
    examine.set_defaults(command=lambda _: doctor.main())
    return parser


def _train(options: argparse.Namespace) -> int:
    kind = RECIPES[options.recipe]
    asked = ("shots", "ways", "network", "iterations", "meta_batch", "inner_lr", "seed", "path")
    chosen = {name: getattr(options, name) for name in asked}
    recipe = kind.of(options.preset, evaluation_tasks=options.tasks, **chosen)
    out = options.out or f"runs/{recipe.label}"
    _set_threads(options)
    report = run(
        recipe,
        out,
        data_root=options.data_root,
        resume=options.resume,
        chunk_size=options.chunk_size,
        max_seconds=options.max_seconds,
        validate_every=options.validate_every,
        progress=not options.quiet,
    )
    if isinstance(report, signal.Signals):
        _say(f"interrupted; --out {out} --resume goes on from its checkpoint")
        return 128 + report  # 130 for SIGINT, 143 for SIGTERM, as a shell says it
    print(report.text())
    print(f"report: {out}/report")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    _set_threads(options)
    report = evaluate_run(
        options.run, data_root=options.data_root, best=options.best, tasks=options.tasks
    )
    print(report.text())
    return 0


def _set_threads(options: argparse.Namespace) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)


def _at_least(least: int) -> type[int]:
    def whole(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return whole  # type: ignore[return-value]


def _say(message: str) -> None:
    print(f"fastmeta: {message}", file=sys.stderr)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    _say(f"warning: {message}")
