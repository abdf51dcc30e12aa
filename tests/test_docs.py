from pathlib import Path

from ultralytics.utils import YAML

from yolo_fewshot.args import ADAPTING, ALL_KEYS, KEYS
from yolo_fewshot.paths import cfg_dir

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_readme_lists_every_key_with_its_default():
    for name, key in ALL_KEYS.items():
        default = 1 if name == "stage" else key.default
        assert f"| `{name}` | {default} | {key.help} |" in README


def test_the_recipe_of_stage_two_gives_the_tables_defaults():
    recipe = YAML.load(cfg_dir() / "stage2.yaml")
    keys = set(KEYS) - {"stage", *ADAPTING}
    assert {k: recipe[k] for k in keys} == {k: KEYS[k].default for k in keys}


def test_gains_in_the_readme_are_those_of_the_recipe():
    recipe = YAML.load(cfg_dir() / "stage2.yaml")
    for column, key in (
        ("box", "box"),
        ("cls", "cls"),
        ("dfl", "dfl"),
        ("sup", "supcon"),
        ("cpe", "cpe"),
        ("tri", "triplet"),
    ):
        assert f"| `{column}_loss` | `{key}` | {recipe[key]} |" in README
