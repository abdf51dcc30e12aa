import re
from pathlib import Path

import pytest
from ultralytics.utils import YAML

import yolo_fewshot
from yolo_fewshot.args import ADAPTING, ALL_KEYS, KEYS
from yolo_fewshot.paths import cfg_dir

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "examples"


def table(page, header):
    """The rows of a page's tables with a header, as lists of cells."""
    rows = []
    for text in (PAGES / page).read_text().split("\n\n"):
        if text.startswith(header):
            rows += [[c.strip().strip("`") for c in x.strip("|").split(" | ")] for x in text.splitlines()[2:]]
    return rows


def test_the_page_of_keys_lists_each_one_once_with_its_default_and_a_meaning():
    rows = table("keys.md", "| key | default | meaning |")
    defaults = {name: str(1 if name == "stage" else key.default) for name, key in ALL_KEYS.items()}
    assert sorted(name for name, _, _ in rows) == sorted(defaults)
    assert {name: default for name, default, _ in rows} == defaults
    assert all(meaning for _, _, meaning in rows)


def test_the_recipe_of_stage_two_gives_the_tables_defaults():
    recipe = YAML.load(cfg_dir() / "stage2.yaml")
    keys = set(KEYS) - {"stage", *ADAPTING}
    assert {k: recipe[k] for k in keys} == {k: KEYS[k].default for k in keys}


def test_gains_in_the_page_of_losses_are_those_of_the_recipe():
    recipe = YAML.load(cfg_dir() / "stage2.yaml")
    rows = table("losses.md", "| column | key | gain | what it is |")
    assert {c.removesuffix("_loss") for c, *_ in rows} == {"box", "cls", "dfl", "epi", "sup", "cpe", "tri"}
    assert {key: float(gain) for _, key, gain, _ in rows} == {key: recipe[key] for _, key, *_ in rows}


@pytest.mark.parametrize("file", ["pyproject.toml", "CITATION.cff"])
def test_version_and_license_are_the_same_everywhere(file):
    text = (ROOT / file).read_text()
    found = {k: re.search(rf'(?m)^{k}\s*[=:]\s*"?([^"\n]+)', text)[1] for k in ("version", "license")}
    assert found == {"version": yolo_fewshot.__version__, "license": "AGPL-3.0-only"}
    assert yolo_fewshot.__version__ in (ROOT / "CHANGELOG.md").read_text()
