"""``llmc doctor``: every check says what was found and what to do; a wrong version is exit 5."""

from __future__ import annotations

import importlib.metadata
import json

import pytest
from click.testing import CliRunner

from llmc.compiler.cli.app import app
from llmc.compiler.cli.doctor import doctor_command
from llmc.compiler.ir.errors import ResourceError
from llmc.compiler.runtime import doctor


def test_checks_say_what_to_do() -> None:
    """A check that says no has a remedy, and triton without a GPU is one of them here."""
    checks = doctor.examine()
    assert {c.about for c in checks} >= {"packages", "machine", "targets", "caches", "optional"}
    for check in checks:
        assert check.found
        assert check.verdict == "ok" or check.about in ("environment", "machine") or check.remedy
    by_name = {c.name: c for c in checks}
    assert by_name["torch"].verdict == "ok"
    assert by_name["reference"].verdict == "ok"


def test_a_version_out_of_range_and_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are named with the pip command, and the command exits with 5."""
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: ["torch>=99", "nothing-of-this-name>=1"]
    )
    found = {c.name: c for c in doctor.examine()}
    assert found["torch"].verdict == "no"
    assert "expected >=99" in found["torch"].found
    assert found["nothing-of-this-name"].remedy == "pip install 'nothing-of-this-name>=1'"
    with pytest.raises(ResourceError, match=r"expected torch to be usable"):
        doctor_command.main([], standalone_mode=False)


def test_a_foreign_cache_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """A kernel cache that others may write is not used, and doctor says so."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "llmc" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    found = {c.name: c for c in doctor.examine()}
    assert found["kernels"].verdict == "no"
    assert "owned and writable by you alone" in found["kernels"].found
    assert found["measured for cpu"].remedy == "llmc tune --target cpu"


def test_json_and_trial() -> None:
    """One object; the trial compares every target that runs here with the reference."""
    done = CliRunner().invoke(app, ["doctor", "--trial", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["usable"] is True
    tried = [c for c in told["checks"] if c["about"] == "trial"]
    assert next(c["name"] for c in tried) == "cpu"
    assert all(c["verdict"] == "ok" for c in tried), tried
