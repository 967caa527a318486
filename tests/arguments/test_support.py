"""docs/support.md is what the tables say, and the verification card claims nothing by mistake."""

import shutil
from pathlib import Path

import pytest

from dsv3_megatron.arguments import REFUSALS, SETTINGS, support

DOCS = Path(__file__).parents[2] / "docs"


def test_page_is_up_to_date(tmp_path):
    shutil.copy(DOCS / "verification.toml", tmp_path)
    support.main([str(tmp_path)])
    current = (DOCS / "support.md").read_text()
    assert current == (tmp_path / "support.md").read_text(), (
        "run: python -m dsv3_megatron.arguments.support docs"
    )


def test_every_row_is_on_the_page():
    page = support.render(support.load_cards(DOCS))
    assert page.count("\n| `") >= len(REFUSALS) + len(SETTINGS)
    assert "{" not in page.split("## Settings")[0].split("## Refused")[1]


def test_unknown_status_is_refused(tmp_path):
    card = '[[card]]\nfeature = "FP8"\nstatus = "works"\ncommand = "x"\nfigure = ""\ndate = 2026-01-01\n'
    (tmp_path / "verification.toml").write_text(card)
    with pytest.raises(ValueError, match="FP8: status 'works' is none of"):
        support.load_cards(tmp_path)
