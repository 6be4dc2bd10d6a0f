"""``python -m fastmeta.recipes.demo``: MAML on sinusoids, seen at work in under a minute."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fastmeta.algorithms import MAML
from fastmeta.inner_loop import explain
from fastmeta.recipes.maml_sinusoid import MAMLSinusoid
from fastmeta.tasks import Sinusoid
from fastmeta.training import plots
from fastmeta.training.evaluation import Evaluation, evaluate
from fastmeta.training.loop import train

SHOTS = 10
STEPS = (0, 1, 5, 10)
# At this inner rate many steps do not diverge, so that means can be compared after 10 of them.
INNER_LR = 0.001
_DRAWN = 3


def demo(
    folder: str = "demo", *, iterations: int = 15_000, tasks: int = 600, max_seconds: float = 40.0
) -> Evaluation:
    """Meta-train MAML on sinusoids, print what adaptation does to held-out curves, and draw it.

    Args:
        folder: where the picture ``adaptation.png`` goes.
        iterations: of meta-training, 25 curves each.
        tasks: held-out curves to evaluate on.
        max_seconds: end the training after this long, whatever was reached.

    Returns:
        The evaluation that was printed.
    """
    recipe = MAMLSinusoid.of(
        "short", shots=SHOTS, inner_lr=INNER_LR, iterations=iterations, evaluation_tasks=tasks
    )
    maml, source = recipe.learner(), recipe.source()
    found = explain(maml.model, source.batch(0, 1), inner=maml.inner, loss=maml.loss)
    print(f"{recipe.summary}, {SHOTS}-shot, inner rate {INNER_LR:g}; path: {found.path}")
    start = time.monotonic()
    result = train(
        maml,
        source,
        optimizer=recipe.optimizer(maml),
        iterations=iterations,
        meta_batch=recipe.meta_batch,
        max_seconds=max_seconds,
    )
    seconds = time.monotonic() - start
    speed = result.step * recipe.meta_batch / seconds
    print(f"{result.step:,} iterations in {seconds:.1f} s, {speed:,.0f} tasks/s\n")
    evaluation = evaluate(maml, source, steps=STEPS, tasks=tasks)
    print(f"query loss on {tasks} held-out curves, before (0) and after inner steps:")
    print(evaluation.table())
    try:
        print(f"\npicture: {_draw(maml, source, Path(folder) / 'adaptation.png')}")
    except plots.MissingPlots as error:
        print(f"\nno picture: {error}")
    return evaluation


@torch.no_grad()
def _draw(maml: MAML, source: Sinusoid, path: Path) -> Path:
    batch = source.batch(0, _DRAWN, split="test")
    x = torch.linspace(*source.x, 200)
    rows = x.view(1, -1, 1).expand(_DRAWN, -1, -1)
    return plots.adapted_curves(
        path,
        x,
        source.function(batch.classes, x),
        (batch.support.x.squeeze(-1), batch.support.y.squeeze(-1)),
        {steps: maml.adapt(batch.support, steps=steps)(rows).squeeze(-1) for steps in STEPS},
        f"MAML adapts to {SHOTS} points of a new curve",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(prog="python -m fastmeta.recipes.demo", description=__doc__)
    parser.add_argument("--out", default="demo", metavar="DIR", help="where the picture goes")
    parser.add_argument("--iterations", type=int, default=15_000, metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads")
    options = parser.parse_args(arguments)
    # One thread computes while another makes the next batch: 25 small tasks are not worth more.
    torch.set_num_threads(options.threads)
    demo(options.out, iterations=options.iterations)
    return 0


if __name__ == "__main__":
    sys.exit(main())
