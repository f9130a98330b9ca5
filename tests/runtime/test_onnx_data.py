"""External tensors of an ONNX file: in plain files of its own folder, or the file is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmc.compiler.ir.errors import ModelError
from llmc.compiler.runtime.exporting.onnx_data import check_data

onnx = pytest.importorskip("onnx")
FLOATS = 6


def written(folder: Path, location: str = "w.data", *, inner: bool = False, **span: int) -> Path:
    """An ONNX file whose one weight [2, 3] lies where ``location`` says."""
    make = onnx.helper
    weight = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[2, 3])
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": 0, "length": 4 * FLOATS, **span}.items():
        weight.external_data.add(key=key, value=str(value))
    y = make.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 3])
    node = make.make_node("Constant", [], ["y"], value=weight)
    graph = make.make_graph([node], "g", [], [y])
    if not inner:
        graph = make.make_graph([make.make_node("Identity", ["w"], ["y"])], "g", [], [y], [weight])
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 21)])
    folder.mkdir(exist_ok=True)
    (folder / "w.data").write_bytes(b"\0" * 4 * FLOATS)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("inner", [False, True])
def test_a_file_of_the_same_folder_is_taken(tmp_path: Path, inner: bool) -> None:
    check_data(written(tmp_path, inner=inner))


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize(
    "location", ["../secret", "/etc/passwd", "a/../../secret", "C:\\secret", "..\\secret", "", "."]
)
def test_places_outside_are_refused(tmp_path: Path, location: str, inner: bool) -> None:
    """By their text alone: nothing is opened, there or not."""
    (tmp_path / "secret").write_bytes(b"\0" * 64)
    with pytest.raises(ModelError, match=r"\w+: expected a file of the same folder, found") as told:
        check_data(written(tmp_path / "in", location, inner=inner))
    assert "nothing of it was read" in str(told.value)


@pytest.mark.parametrize("deep", [False, True])
def test_links_are_refused(tmp_path: Path, deep: bool) -> None:
    """A file that is a link, and one below a folder that is."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "w.data").write_bytes(b"\0" * 64)
    path = written(tmp_path / "in", "sub/w.data" if deep else "w.link")
    if deep:
        (path.parent / "sub").symlink_to(out, target_is_directory=True)
    else:
        (path.parent / "w.link").symlink_to(out / "w.data")
    with pytest.raises(ModelError, match="found a link"):
        check_data(path)


@pytest.mark.parametrize(
    "span", [{"offset": 4}, {"length": 4 * FLOATS + 1}, {"offset": -4}, {"offset": 10**30}]
)
def test_bytes_beyond_a_file_are_refused(tmp_path: Path, span: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"w: expected bytes inside w\.data, found offset"):
        check_data(written(tmp_path, **span))


def test_what_is_no_onnx_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\xff" * 40)
    with pytest.raises(ModelError, match="expected an ONNX file"):
        check_data(path)
    with pytest.raises(ModelError, match="expected an ONNX file"):
        check_data(tmp_path / "none.onnx")
