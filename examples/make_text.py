"""Cut a calibration text and a held-out text from the installed Python standard library.

    python examples/make_text.py --out examples/pylm/text

Writes ``calibration.txt``, ``heldout.txt`` and ``manifest.json`` (the Python version, the modules
and the SHA-256 of each text). The two sets share no module: a top-level module or package goes to
one of them by the hash of its name, so a package is never split. The same Python version gives the
same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

CALIBRATION_CHARS = 1_200_000
HELDOUT_CHARS = 800_000
# Shorter files are mostly re-exports; longer ones are tables and would fill a text on their own.
FILE_CHARS = range(1_500, 60_000)
# Third-party code, tests, and data written as Python.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
SKIPPED_FOLDERS |= {"pydoc_data", "encodings", "config"}


@dataclass(frozen=True)
class Text:
    """One of the two texts: its name, size, hash, and the modules it was cut from."""

    name: str
    characters: int
    sha256: str
    files: list[str]


def digest(name: str) -> str:
    """SHA-256 of a name, in hex: the source of every choice made here, so none is random."""
    return hashlib.sha256(name.encode()).hexdigest()


def is_heldout(path: Path) -> bool:
    """Whether a file (relative to the library's root) belongs to the held-out set: 2 in 5 do."""
    return int(digest(path.parts[0].removesuffix(".py")), 16) % 5 < 2


def library_files(root: Path) -> list[Path]:
    """The usable source files below ``root``, relative to it, ordered by the hash of their name."""
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts) and path.stat().st_size in FILE_CHARS:
            found.append(relative)
    return sorted(found, key=lambda path: digest(path.as_posix()))


def write_text(name: str, files: list[Path], root: Path, limit: int, out: Path) -> Text:
    """Join whole files until ``limit`` characters are reached; write and describe the text."""
    parts: list[str] = []
    used: list[str] = []
    size = 0
    for path in files:
        if size >= limit:
            break
        source = (root / path).read_text(encoding="utf-8", errors="replace").strip()
        parts.append(source)
        used.append(path.as_posix())
        size += len(source)
    text = "\n\n\n".join(parts) + "\n"
    (out / f"{name}.txt").write_text(text, encoding="utf-8", newline="\n")
    return Text(name, len(text), hashlib.sha256(text.encode()).hexdigest(), used)


def make_text(out: Path, root: Path | None = None) -> list[Text]:
    """Write both texts and the manifest into ``out``; returns their descriptions.

    Args:
        out: the folder to write to; made when missing.
        root: the library to read; the running Python's standard library when None.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = library_files(root)
    out.mkdir(parents=True, exist_ok=True)
    texts = [
        write_text(
            "calibration", [f for f in files if not is_heldout(f)], root, CALIBRATION_CHARS, out
        ),
        write_text("heldout", [f for f in files if is_heldout(f)], root, HELDOUT_CHARS, out),
    ]
    manifest = {"python": platform.python_version(), "texts": [asdict(text) for text in texts]}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return texts


def main() -> None:
    """Read the options, write the texts, print what they are."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    default = Path(__file__).resolve().parent / "pylm" / "text"
    parser.add_argument("--out", type=Path, default=default, help="folder to write to")
    texts = make_text(parser.parse_args().out)
    print(f"standard library of Python {platform.python_version()}")
    for text in texts:
        print(
            f"{text.name:<12}{text.characters:>9} characters {len(text.files):>4} files  "
            f"sha256 {text.sha256[:16]}"
        )


if __name__ == "__main__":
    main()
