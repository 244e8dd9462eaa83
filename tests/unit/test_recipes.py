"""The recipe registry, and every recipe that ships."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from rove import recipes
from rove.config import load
from rove.config.schema import GRPO, PPO, Vine
from rove.config.validate import validate
from rove.errors import RoveError
from rove.runtime import setup

NAMES = [r.name for r in recipes.all()]


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_sound(name, tmp_path):
    recipe = recipes.get(name)
    run = recipe.build()
    validate(run)
    assert run.name == name
    assert 20 < len(recipe.summary) < 100
    load.save(run, tmp_path / "run.json")
    assert load.load(tmp_path / "run.json") == run


def test_what_ships():
    assert {"demo", "tabletop_all", "tabletop_grpo", "tabletop_ppo", "tabletop_vine"} <= set(NAMES)
    vine = recipes.get("tabletop_vine").build()
    assert isinstance(vine.algorithm, Vine) and recipes.get("demo").build() == replace(vine, name="demo")
    assert isinstance(recipes.get("tabletop_ppo").build().algorithm, PPO)
    assert isinstance(recipes.get("tabletop_grpo").build().algorithm, GRPO)
    assert recipes.get("tabletop_all").build().env.tasks == "train"


def test_libero_recipes_play_the_published_horizons():
    from rove.envs.libero.suite import HORIZONS

    for suite in ("spatial", "object", "goal", "10", "90"):
        run = recipes.get(f"libero_{suite}_oft").build()
        assert run.env.horizon == HORIZONS[suite] and run.policy.temperature == 1.6
        assert isinstance(run.algorithm, GRPO) and run.algorithm.length_normalization


def test_a_misspelt_name_gets_the_nearest():
    with pytest.raises(RoveError, match="Unknown recipe 'tabeltop_ppo'. Did you mean 'tabletop_ppo'"):
        recipes.get("tabeltop_ppo")


@pytest.fixture
def own_registry(monkeypatch):
    recipes.all()
    monkeypatch.setattr(recipes, "_recipes", dict(recipes._recipes))
    # Children of later tests begin without the files of these.
    monkeypatch.setattr(setup, "_calls", dict(setup._calls))
    yield
    sys.modules.pop("mine", None)


FILE = '''
from dataclasses import replace
from rove.recipes import recipe
from rove.recipes.tabletop import demo

@recipe
def {name}():
    """A recipe in a file of its own."""
    return replace(demo(), name="{name}", seed=7)
'''


@pytest.mark.usefixtures("own_registry")
def test_a_recipe_in_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FILE.format(name="mine"))
    for _ in range(2):  # reading a file twice is no clash
        assert recipes.get(f"{file}:mine").build().seed == 7
    with pytest.raises(RoveError, match="Unknown recipe 'mime'. Did you mean 'mine'"):
        recipes.get(f"{file}:mime")


@pytest.mark.usefixtures("own_registry")
def test_two_recipes_of_one_name_clash(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FILE.format(name="demo"))
    with pytest.raises(RoveError, match="Two recipes are called 'demo'"):
        recipes.get(f"{file}:demo")


@pytest.mark.usefixtures("own_registry")
def test_a_file_must_not_shadow_a_module(tmp_path):
    file = tmp_path / "json.py"
    file.write_text(FILE.format(name="mine"))
    with pytest.raises(RoveError, match="A module called 'json' is imported already; rename"):
        recipes.get(f"{file}:mine")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RoveError, match="No recipe file at .*gone.py"):
        recipes.get(f"{tmp_path / 'gone.py'}:mine")


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\nx = (\n", r"mine.py, line 2: SyntaxError: '\(' was never closed"),
        ("import math\n\nmath.sqrt(-1)\n", r"mine.py, line 3: ValueError: math domain error"),
        (
            "import nowhere\n",
            r"mine.py, line 1: ModuleNotFoundError: No module named 'nowhere'",
        ),
        ("\0", r"mine.py: SyntaxError: source code string cannot contain null bytes"),
    ],
)
def test_a_file_that_cannot_be_imported_is_named_with_its_line(tmp_path, text, message):
    file = tmp_path / "mine.py"
    file.write_text(text)
    for _ in range(2):  # a second try does not find half a module
        with pytest.raises(RoveError, match=message):
            recipes.get(f"{file}:mine")
    assert "mine" not in sys.modules


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    return replace(demo(), nmae='mine')", r"mine.py, line 9: TypeError: .*nmae"),
        ("    demo()", r"Recipe 'mine' in .*mine.py returns NoneType; expected a rove.Run"),
    ],
)
def test_a_recipe_that_fails_is_named_with_its_line(tmp_path, body, message):
    file = tmp_path / "mine.py"
    file.write_text("\n".join([*FILE.format(name="mine").splitlines()[:-1], body]))
    with pytest.raises(RoveError, match=message):
        recipes.build(f"{file}:mine")


def test_only_a_recipe_in_a_file_can_be_built(tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(RoveError, match="has to end in .py"):
        recipes.import_file(tmp_path / "mine.txt")
    with pytest.raises(RoveError, match="mine.py is a file: name a recipe in it, mine.py:NAME"):
        recipes.get("mine.py")


def test_a_recipe_needs_a_summary():
    with pytest.raises(RoveError, match="'silent' needs a docstring"):

        @recipes.recipe
        def silent():
            return recipes.get("demo").build()
