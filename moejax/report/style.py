"""How a page of the report looks, for light and dark, for a phone and a desk; and its tables and figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

CSS = """
:root { color-scheme: light dark; --ink: #333; --strong: #111; --page: #fff; --rule: #ccc; --shade: #f4f4f2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ccc; --strong: #f2f2f2; --page: #16181b; --rule: #45494e; --shade: #1f2226; }
}
body { margin: 0 auto; padding: 1rem; max-width: 72rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--page); }
h1, h2, h3, th, b { color: var(--strong); }
h2 { margin-top: 2.5rem; border-top: 1px solid var(--rule); padding-top: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: pre; }
.words td, .words th { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.words td:first-child { white-space: nowrap; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem 2rem; }
figure { margin: 0; }
figure svg { width: 100%; height: auto; max-width: 34rem; }
.scroll { overflow-x: auto; }
.scroll figure svg { max-width: 62rem; min-width: 38rem; }
svg text { font-family: system-ui, sans-serif !important; }
figcaption, .note { font-size: .9rem; }
@media (max-width: 40rem) {
  table { font-size: .8rem; }
  th, td { padding: .25rem .35rem; }
  th:first-child, td:first-child { min-width: 7rem; white-space: pre-wrap; }
  th:not(:first-child) { white-space: normal; }
}
code, pre { font-size: .85rem; overflow-wrap: anywhere; }
pre { background: var(--shade); padding: 1rem; overflow-x: auto; }
"""


def figure(svg: str, caption: str = "") -> str:
    """A picture, nothing for none; `caption` is trusted text of this project."""
    if not svg:
        return ""
    return f"<figure>{svg}{f'<figcaption>{caption}</figcaption>' if caption else ''}</figure>\n"


def table(head: Sequence[str], lines: Iterable[Sequence[str]], kind: str = "") -> str:
    """Rows of text; `kind` is a class: `words` for what is no number."""
    columns = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>\n" for line in lines)
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def page(title: str, body: str, css: str = "", refresh: int = 0) -> str:
    """A whole document that loads nothing; `title` is escaped here. It loads itself again every `refresh` seconds, 0 for never."""
    again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{again}'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{CSS}{css}</style></head><body>\n{body}\n</body></html>\n"
    )
