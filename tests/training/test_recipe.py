from __future__ import annotations

from pathlib import Path

import pytest

from code2lora.errors import UserError
from code2lora.training.recipe import Recipe, bundled_recipes, load_recipe, parse_recipe


def test_every_bundled_recipe_is_read() -> None:
    assert "mini" in bundled_recipes()
    for name in bundled_recipes():
        load_recipe(name)


def test_nested_values_arrive_and_the_rest_are_defaults() -> None:
    text = """
        fit.max_steps = 3
        fit.windows.told_share = [0.2, 0.5]
        mine.targets.per_file = 2
    """

    recipe = parse_recipe(text, where="x.toml")

    assert recipe.fit.max_steps == 3
    assert recipe.fit.windows.told_share == (0.2, 0.5)
    assert recipe.mine.targets.per_file == 2
    assert recipe.evaluate == Recipe().evaluate


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[fitt]\n", "x.toml: unknown key fitt", "did you mean fit?"),
        (
            "[fit.windows]\ncommit = 3\n",
            "x.toml: unknown key fit.windows.commit",
            "did you mean fit.windows.commits?",
        ),
        ("[mine]\nzzz = 3\n", "x.toml: unknown key mine.zzz", None),
        ("[mine\n", "x.toml is not valid TOML", None),
        ("[mine]\ncommits = 'many'\n", "x.toml: mine.commits is 'many'", None),
        ("[fit.learner]\nhead = 'other'\n", "x.toml: fit.learner.head is 'other'", None),
        ("[fit.items]\nmax_tokens = 64\n", "more than three quarters of max_tokens 64", None),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str, hint: str | None) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe(text, where="x.toml")

    assert message in caught.value.message
    assert caught.value.hint == hint


def test_a_recipe_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no recipe") as caught:
        load_recipe(str(tmp_path / "none.toml"))

    assert caught.value.hint is not None
    assert "mini" in caught.value.hint


def test_a_recipe_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("[evaluate]\nwrong = 3\n")

    assert load_recipe(str(tmp_path / "own.toml")).evaluate.wrong == 3
