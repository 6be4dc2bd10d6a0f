"""One file per published experiment: its settings, its published numbers, where those are from."""

from __future__ import annotations

from fastmeta.recipes.base import Recipe
from fastmeta.recipes.maml_omniglot import MAMLOmniglot
from fastmeta.recipes.maml_sinusoid import MAMLSinusoid
from fastmeta.recipes.run import RECIPES, evaluate_run, run

__all__ = ["RECIPES", "MAMLOmniglot", "MAMLSinusoid", "Recipe", "evaluate_run", "run"]
