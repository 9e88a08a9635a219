"""docs/config.md has every key and is up to date."""

from __future__ import annotations

from pathlib import Path

import pytest
from detectron2.config import get_cfg

from detr_family.config import defaults, loading, projects
from detr_family.config.reference import entries, page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "config.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tools/config_reference.py"


def test_it_has_every_key_that_is_not_detectron2s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projects, "_added", [])  # another test may have imported a project
    cfg = get_cfg()
    defaults.add_detr_family_config(cfg)
    ours = set(loading._keys(cfg)) - set(loading._keys(get_cfg()))
    assert len(ours) > 50
    assert not [key for key in ours if page().count(f"`{key}`") != 1]


def test_a_comment_is_about_the_keys_below_it() -> None:
    found = list(
        entries(
            """
            cfg.MODEL.OWL = CfgNode()
            _C = cfg.MODEL.OWL

            # How far it sees,
            # metres.
            _C.SIGHT = 3
            # Wings.
            _C.LEFT = 1
            _C.RIGHT = 1
            # What it eats.
            cfg.MODEL.OWL.FOOD = CfgNode()
            cfg.MODEL.OWL.FOOD.MICE = True

            # SOLVER.GAMMA is not used.
            """
        )
    )
    assert [(x.text, x.keys, x.group) for x in found if x.text] == [
        ("How far it sees, metres.", ["MODEL.OWL.SIGHT"], ""),
        ("Wings.", ["MODEL.OWL.LEFT", "MODEL.OWL.RIGHT"], ""),
        ("What it eats.", ["MODEL.OWL.FOOD.MICE"], "MODEL.OWL.FOOD"),
        ("SOLVER.GAMMA is not used.", [], ""),
    ]
    with pytest.raises(ValueError, match=r"nothing of MODEL\.OWL\.SIZE"):
        list(entries("# Something.\n\ncfg.MODEL.OWL.SIZE = 3"))
