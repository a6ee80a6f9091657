"""Pages with code: docs/new_router.md, whose router passes the battery of all routers, and docs/models.md, whose family is one."""

import pathlib
import re

import battery
import numpy as np
import oracle_routers
import pytest
from oracle_routers import Choice, edge, ranked

from moejax import config
from moejax.checkpoint.hugging_face.families import FAMILIES, deepseek
from moejax.moe import layer, routers

pytestmark = pytest.mark.usefixtures("strict_dtypes")

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGE, MODELS = DOCS / "new_router.md", DOCS / "models.md"


def plain(token, spec):
    """The reference: the best of each half, one token at a time."""
    half = spec.experts // 2
    parts = token.logits[:half], token.logits[half:]
    best = [ranked(part) for part in parts]
    margin = min(edge(part, order, 1) for part, order in zip(parts, best, strict=True))
    return Choice([best[0][0], half + best[1][0]], [True, True], 0, margin)


@pytest.fixture
def halves(monkeypatch):
    """The page's router, in the library's table while a test runs; its reference in the oracle's."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    monkeypatch.setitem(routers.ROUTERS, "halves", None)  # so that it is gone afterwards
    monkeypatch.setitem(oracle_routers.CHOOSE, "halves", plain)
    exec(compile(code, str(PAGE), "exec"), {})
    body = [line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(body) <= 20
    return config.MoE(num_experts=8, hidden=4, top_k=2, router="halves", capacity_factor=0.75)


def test_the_example_passes_the_battery(halves):
    """Oracle on 200 groups with ties, padding, causality, rerouting."""
    layer.check(halves, context=battery.SIZE)
    battery.check_oracle(halves, battery.draw(halves))
    battery.check_padding(halves)
    battery.check_causal(halves)
    experts = battery.call(halves, battery.draw(halves)).tokens["original"]
    valid = battery.draw(halves).valid
    assert (experts[valid][:, 0] < 4).all() and (experts[valid][:, 1] >= 4).all()
    assert len(np.unique(experts[valid])) == 8


def test_the_page_on_models_has_every_family():
    """In its table of fields and in that of parity; the example is the code that it says it is."""
    page = MODELS.read_text()
    table, parity = (
        page.split("## Families")[1].split("**config.json")[0],
        page.split("## Is it")[1].split("## Fine")[0],
    )
    named = {
        name for line in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", line)
    }
    measured = {
        name for line in re.findall(r"^\| (\w.*?) \|", parity, re.MULTILINE) for name in re.findall(r"\w+", line)
    }
    assert named - {"model_type"} == FAMILIES.keys() and FAMILIES.keys() <= measured
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    source = pathlib.Path(deepseek.__file__).read_text()
    assert all(part.strip() in source for part in code.split("\n\n\n"))
