"""A report as one web page: tables, and figures inside it; no scripts, nothing loaded."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fdfdfc; --line: #d9dbde;
  --soft: #f1f2f4; --faint: #5b6168; --link: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6e8; --paper: #16181b; --line: #363a40;
  --soft: #202328; --faint: #a3a9b0; --link: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .5rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line); }
p { margin: .4rem 0; max-width: 52rem; color: var(--faint); }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; font-size: .95rem; }
a { color: var(--link); }
.table { overflow-x: auto; max-height: 40rem; margin: .9rem 0; border: 1px solid var(--line);
  border-radius: .4rem; }
table { border-collapse: collapse; width: 100%; font-size: .84rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .65rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
td { min-width: 3.5rem; overflow-wrap: break-word; }
th { position: sticky; top: 0; background: var(--soft); font-weight: 600; white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
tbody tr:hover { background: var(--soft); }
.number { text-align: right; white-space: nowrap; }
figure { margin: 1.2rem 0; }
img { display: block; max-width: 100%; height: auto; background: #fff; padding: .5rem;
  border: 1px solid var(--line); border-radius: .4rem; }
figcaption { font-size: .86rem; color: var(--faint); margin-top: .35rem; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def html_page(title: str, sections: Iterable[Any], images: Mapping[str, bytes]) -> str:
    """Write sections as one page.

    Args:
      title: heading.
      sections: with ``title``, ``notes``, ``rows`` and ``figures``, as `report.sections` makes.
      images: name of a figure to its PNG.

    Returns:
      The page; all text is escaped, and the page forbids itself to load anything.

    >>> "<b>" in html_page("<b>", (), {})
    False
    """
    found = list(sections)
    contents = "".join(
        f'<a href="#s{i}">{escape(section.title)}</a>' for i, section in enumerate(found)
    )
    body = "".join(_section(i, section, images) for i, section in enumerate(found))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<nav>{contents}</nav>\n{body}</body>\n</html>\n"
    )


def _section(i: int, section: Any, images: Mapping[str, bytes]) -> str:
    notes = "".join(f"<p>{escape(note)}</p>\n" for note in section.notes)
    drawn = "".join(_figure(images[name], what) for name, what, _ in section.figures)
    heading = f'<h2 id="s{i}">{escape(section.title)}</h2>\n'
    return f"<section>\n{heading}{notes}{drawn}{_table(section.rows)}</section>\n"


def _figure(image: bytes, what: str) -> str:
    data = base64.b64encode(image).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(what)}">'
        f"<figcaption>{escape(what)}</figcaption></figure>\n"
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    filled = [{k: v for k, v in row.items() if v not in (None, "")} for row in rows]
    names = [name for name in dict.fromkeys(k for row in rows for k in row)
             if any(name in row for row in filled)]  # fmt: skip
    if not names:
        return ""
    right = {n for n in names if all(_is_number(row[n]) for row in filled if n in row)}
    head = "".join(f"<th{_class(n in right)}>{escape(str(n))}</th>" for n in names)
    body = "".join(
        "<tr>" + "".join(f"<td{_class(n in right)}>{_text(row.get(n))}</td>" for n in names)
        + "</tr>\n"
        for row in filled
    )  # fmt: skip
    return (
        f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n'
        "</table></div>\n"
    )


def _class(is_number: bool) -> str:
    return ' class="number"' if is_number else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))
