"""Tiny random models of many architectures, saved to folders and captured once each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import MORE, ZOO, make, random_tokens


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``arch`` runs over the supported architectures, ``more`` over further ones."""
    if "arch" in metafunc.fixturenames:
        metafunc.parametrize("arch", list(ZOO))
    if "more" in metafunc.fixturenames:
        metafunc.parametrize("more", list(MORE))


class Case:
    """One architecture: the eager model, its folder and its program."""

    def __init__(self, name: str, folder: Path) -> None:
        from llmc.compiler.capture import capture

        self.name = name
        self.model = make(name)
        self.folder = folder
        self.model.save_pretrained(folder)
        self.program = capture(folder)
        self.loads_to_capture = self.program.weights.loads

    def eager(self, **inputs: torch.Tensor) -> torch.Tensor:
        import inspect

        known = inspect.signature(self.model.forward).parameters
        given = {k: v for k, v in inputs.items() if k in known}
        with torch.no_grad():
            out: torch.Tensor = self.model(**given).logits
        return out

    def run(self, **inputs: torch.Tensor) -> torch.Tensor:
        from llmc.compiler.ir.interpret import run

        with torch.no_grad():
            out: torch.Tensor = run(self.program, inputs)
        return out


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """``case(name)``: captured once per session."""
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            made[name] = Case(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="session")
def build() -> Callable[..., Any]:
    """``build(name, **config)``: a tiny random model."""
    return make


@pytest.fixture(scope="session")
def tokens() -> Callable[..., dict[str, torch.Tensor]]:
    """``tokens(batch, length, seed)``: inputs of a whole batch."""
    return random_tokens
