"""Pass strings and recipe files: what they mean, and what each mistake says."""

from pathlib import Path

import pytest

from llmc.compiler.ir.errors import UsageError
from llmc.compiler.pipeline import recipe


def names(r: recipe.Recipe) -> list[list[str]]:
    return [[c.name for c in stage] for stage in r.stages]


@pytest.mark.parametrize(
    "text", ["smooth,w4,prune24", "prune24,w4,smooth", "w4,prune24,smooth", "w4,smooth,prune24"]
)
def test_order_inside_a_string_is_free(text):
    r = recipe.from_strings([text])
    assert names(r) == [["smooth", "prune24", "w4"]]
    assert r.text() == "smooth,prune24,w4"


def test_knobs_continue_the_pass_before_them():
    r = recipe.from_strings(["smooth:alpha=0.6,w4:group=64,solver=rtn,prune24"])
    by_name = {c.name: c.made for c in r.calls}
    assert by_name["smooth"].alpha == 0.6
    assert (by_name["w4"].group, by_name["w4"].solver, by_name["w4"].bits) == (64, "rtn", 4)
    assert by_name["w4"].explicit("group")
    assert not by_name["w4"].explicit("clip")
    assert r.text() == "smooth:alpha=0.6,prune24,w4:solver=rtn,group=64"
    assert recipe.from_strings([r.text()]).text() == r.text()


@pytest.mark.parametrize("text", ["w3:group=row,symmetric=false", "prune:n=1,m=4,act_order=true"])
def test_the_canonical_text_parses_back(text):
    r = recipe.from_strings([text])
    assert recipe.from_strings([r.text()]).calls == r.calls
    assert r.text() == r.text().lower()


def test_repeated_strings_are_barriers():
    r = recipe.from_strings(["smooth", "prune24", "w4"])
    assert names(r) == [["smooth"], ["prune24"], ["w4"]]


@pytest.mark.parametrize(
    ("strings", "words"),
    [
        (["w7"], ["'w7'", "did you mean 'w"]),
        (["prun24"], ["'prun24'", "did you mean 'prune24'"]),
        (["w4:gruop=64"], ["'gruop'", "did you mean 'group'"]),
        (["w4:bits=3"], ["knob", "'bits'"]),
        (["smooth:alpha=1.5"], ["smooth:alpha", "0..1", "1.5"]),
        (["smooth:alpha=lots"], ["smooth:alpha", "a number", "'lots'"]),
        (["smooth:alpha=nan"], ["smooth:alpha", "a number"]),
        (["w4:group=12.5"], ["w4:group", "whole number"]),
        (["w4:solver=gptqq"], ["w4:solver", "did you mean 'gptq'"]),
        (["w4:symmetric=maybe"], ["w4:symmetric", "true or false"]),
        (["prune:n=4,m=4"], ["0 < n < m", "n=4, m=4"]),
        (["prune:n=2"], ["0 < n < m"]),
        (["w4,w8"], ["one pass that writes codes", "'w4'", "'w8'"]),
        (["prune24,prune48"], ["one pass that writes zeros"]),
        (["w4", "prune24"], ["'prune24' before 'w4'", "nearest legal order: --passes prune24,w4"]),
        (["w4", "smooth"], ["'smooth' before 'w4'", "smooth,w4"]),
        (["w4,,prune24"], ["separated by commas"]),
        (["group=64"], ["a pass before the knob"]),
        (["w4:group="], ["knob=value"]),
        (["w4:group=64,group=32"], ["once"]),
        ([], ["at least one pass"]),
    ],
)
def test_mistakes_name_the_field_and_the_way_out(strings, words):
    with pytest.raises(UsageError) as e:
        recipe.from_strings(strings)
    message = str(e.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_recipe_file_with_overrides(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "version: 1\n"
        "stages:\n"
        "  - smooth: {alpha: 0.5}\n"
        "    w4: {group: 64}\n"
        "overrides:\n"
        "  - where: {role: [down], block: [0, -1]}\n"
        "    set: {w4: {group: 32}}\n"
        "  - where: {site: [block0/linear0]}\n"
        "    skip: [w4]\n"
    )
    r = recipe.from_file(path)
    w4 = next(c for c in r.calls if c.name == "w4")
    assert recipe.at_site(w4, r.overrides, "block0/linear0", "q", 0, 4) is None
    last = recipe.at_site(w4, r.overrides, "block3/linear6", "down", 3, 4)
    assert last is not None
    assert last.made.group == 32
    assert recipe.at_site(w4, r.overrides, "block2/linear6", "down", 2, 4).made.group == 64


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version: 2\nstages: [{w4: {}}]\n", ["version"]),
        ("version: 1\nstage: [{w4: {}}]\n", ["stage"]),
        ("version: 1\nstages: []\n", ["stages"]),
        ("version: 1\nstages: [{w4: {group: big}}]\n", ["w4:group", "'big'"]),
        ("version: 1\nstages: [{w4: {}}]\noverrides: [{where: {rol: [q]}}]\n", ["where.rol"]),
        (
            "version: 1\nstages: [{w4: {}}]\noverrides: [{where: {}, skip: [w8]}]\n",
            ["overrides.0", "'w8'"],
        ),
        ("version: [1\n", ["YAML"]),
        ("just text\n", ["mapping"]),
    ],
)
def test_recipe_mistakes(tmp_path, text, words):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as e:
        recipe.from_file(path)
    assert "\n" not in str(e.value)
    for word in words:
        assert word in str(e.value)


def test_missing_recipe_file(tmp_path):
    with pytest.raises(UsageError, match="recipe file"):
        recipe.from_file(tmp_path / "none.yaml")


RECIPES = sorted((Path(__file__).parents[2] / "spec" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path):
    assert recipe.from_file(path).calls


def test_the_schema_is_fresh(same_as_file):
    same_as_file(recipe.schema_text(), RECIPES[0].parent / "schema.json")
