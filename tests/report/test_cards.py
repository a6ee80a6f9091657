"""The cards of docs/: their numbers are those of the JSON they quote, and every router and balancer has one."""

import json
import pathlib
import re

import pytest

from moejax.bench import balancers as balancer_bench
from moejax.bench import protocol
from moejax.bench import routers as router_bench
from moejax.config import Config
from moejax.moe.balancers import BALANCERS
from moejax.moe.routers import ROUTERS
from moejax.report import cards

ROOT = pathlib.Path(__file__).parents[2]
PAGES = {
    name: (ROOT / "docs" / f"{name}.md", ROOT / "benchmarks" / f"{name}_cpu.json") for name in ("routers", "balancers")
}


@pytest.mark.parametrize("name", PAGES)
def test_the_page_quotes_its_json(name):
    """Filling it in again changes nothing; other numbers would."""
    page, file = PAGES[name]
    text, result = page.read_text(), json.loads(file.read_text())
    assert cards.fill(text, result) == text
    first = next(iter(result["rows"].values()))
    numbers = first.get("skewed", first)
    numbers["last" if "last" in numbers else "bits_per_byte"] += 1
    assert cards.fill(text, result) != text


def test_every_router_has_a_card_and_a_picture():
    """By the options of the bench; and every card's row was measured with the options of today."""
    page, file = PAGES["routers"]
    rows = json.loads(file.read_text())["rows"]
    used = {options.get("router", "topk") for options in router_bench.ROUTERS.values()}
    assert used == set(ROUTERS)
    shown = re.findall(r"<!-- card (\w+) -->", page.read_text())
    assert sorted(shown) == sorted(rows) == sorted(router_bench.ROUTERS)
    for name, options in router_bench.ROUTERS.items():
        assert rows[name]["options"] == json.loads(json.dumps(options)), name
        assert (ROOT / "docs" / cards.PICTURES / f"{name}.png").stat().st_size > 1000


def test_every_balancer_is_in_the_table():
    """Each option turns up in the bench or, where it belongs to one router, in that of routers; and on the page."""
    settings = [*balancer_bench.BALANCERS.values(), *router_bench.ROUTERS.values()]
    text = PAGES["balancers"][0].read_text()
    for name in BALANCERS:
        assert any(options.get(name) for options in settings), name
        assert f"| `{name}` |" in text, name


def test_every_setting_can_be_run():
    """The options of both benches pass the checks on the default experiment's sizes."""
    for options in router_bench.ROUTERS.values():
        protocol.setting(Config(), "router", router_bench.CAPACITY | options)
    for options in balancer_bench.BALANCERS.values():
        protocol.setting(Config(), "balancer", balancer_bench.NONE | options)
