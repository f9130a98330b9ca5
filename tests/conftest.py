"""Options and fixtures that every test folder shares."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Tests never reach for the network, and workers share the machine's cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--update-golden``: rewrite golden files and generated pages instead of comparing."""
    parser.addoption(
        "--update-golden",
        action="store_true",
        default=False,
        help="rewrite golden files and generated pages; read the diff before committing it",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where torch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, torch sees none")
    for item in marked:
        item.add_marker(skip)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository's root, which is also the root of the package."""
    return ROOT


@pytest.fixture(scope="session")
def update_golden(request: pytest.FixtureRequest) -> bool:
    """True when the run was asked to rewrite golden files."""
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(scope="session")
def same_as_file(update_golden: bool) -> Callable[[str, Path], None]:
    """``same_as_file(text, path)``: the committed file holds exactly this text.

    With ``--update-golden`` the file is written instead. A file that is missing is a failure,
    never a silent first write.
    """

    def check(text: str, path: Path) -> None:
        if update_golden:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        name = path.relative_to(ROOT)
        if not path.exists():
            pytest.fail(f"{name} is missing; `make golden` writes it", pytrace=False)
        old = path.read_text(encoding="utf-8")
        diff = "\n".join(
            difflib.unified_diff(
                old.splitlines(), text.splitlines(), f"{name} (committed)", "now", lineterm="", n=2
            )
        )
        if old != text:
            pytest.fail(f"{name} is stale; `make golden` rewrites it\n{diff[:4000]}", pytrace=False)

    return check


@pytest.fixture
def golden(
    request: pytest.FixtureRequest, same_as_file: Callable[[str, Path], None]
) -> Callable[[str, str], None]:
    """``golden(name, text)``: compare with ``tests/golden/<folder of the test>/<name>.txt``."""
    folder = request.path.parent.relative_to(ROOT / "tests")

    def check(name: str, text: str) -> None:
        same_as_file(text, ROOT / "tests" / "golden" / folder / f"{name}.txt")

    return check


@pytest.fixture(scope="session")
def pylm() -> Path:
    """The folder of the demo model: a trained Llama of 5 M parameters (bf16, vocabulary 2048)."""
    return ROOT / "examples" / "pylm"


@pytest.fixture(scope="session")
def pylm_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``calibration.txt`` and ``heldout.txt`` cut from the standard library.

    The one that ``make`` left in ``examples/pylm/text`` when it is there, else a fresh one.
    """
    made = ROOT / "examples" / "pylm" / "text"
    if (made / "manifest.json").exists():
        return made
    import importlib.util

    out = tmp_path_factory.mktemp("pylm_text")
    spec = importlib.util.spec_from_file_location("make_text", ROOT / "examples" / "make_text.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_text"] = module
    spec.loader.exec_module(module)
    module.make_text(out)
    return out
