from __future__ import annotations

import json

import pytest
import torch

from fastmeta.tasks import Sinusoid
from fastmeta.training.settings import check_model, check_settings, environment, fingerprint
from tests.training.runs import Run


def test_the_fingerprint_holds_what_decides_the_numbers() -> None:
    run = Run(order=1)
    found = fingerprint(
        run.maml, Sinusoid(shots=7, seed=3), run.optimizer, run.scheduler, {"meta_batch": 4}
    )
    expected = {
        "algorithm": "MAML",
        "inner": "SGD",
        "inner.lr": 0.01,
        "inner.steps": 1,
        "order": 1,
        "loss": "mse_loss",
        "optimizer": "Adam",
        "optimizer.lr": 0.01,
        "scheduler": "StepLR",
        "source.kind": "Sinusoid",
        "source.shots": 7,
        "source.seed": 3,
        "meta_batch": 4,
    }
    assert {name: found[name] for name in expected} == expected
    assert json.loads(json.dumps(found)) == found
    assert "source.device" not in found


def test_equal_settings_pass() -> None:
    check_settings({"a": 1, "b": [1, 2]}, {"a": 1, "b": [1, 2]})


def test_every_difference_is_named() -> None:
    with pytest.raises(ValueError, match=r"a=2 \(was 1\), b=absent \(was 3\), c=4 \(was absent\)"):
        check_settings({"a": 1, "b": 3}, {"a": 2, "c": 4})


def test_the_tensor_that_does_not_fit_is_named() -> None:
    one = {"w": torch.zeros(2), "v": torch.zeros(3)}
    check_model(one, one)
    with pytest.raises(ValueError, match=r"'w' is .* shape \[2\], got a float32 .* shape \[4\]"):
        check_model({**one, "w": torch.zeros(4)}, one)
    with pytest.raises(ValueError, match=r"'w' is .* shape \[2\], got absent"):
        check_model({"v": one["v"]}, one)
    with pytest.raises(ValueError, match=r"float32 .*, got a float64"):
        check_model({**one, "w": torch.zeros(2, dtype=torch.float64)}, one)


def test_the_environment_names_machine_and_versions() -> None:
    found = environment()
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"]
    json.dumps(found)
