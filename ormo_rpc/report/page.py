"""A self-contained HTML page of table and pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

_STYLE = """body { font-family: sans-serif; margin: 2em auto; max-width: 72em } table { border-collapse: collapse }
td, th { border-bottom: 1px solid #ccc; padding: .3em .7em; text-align: left; white-space: nowrap }
img { max-width: 100% } div { overflow-x: auto }"""


def page(table: Sequence[Sequence[str]], figures: Mapping[str, Figure], above: str = "", below: Sequence[str] = ()) -> str:
    """Render the page.

    Args:
        table: Header and rows.
        figures: Pictures by their titles.
        above: What all runs have in common.
        below: Notes to the table.
    """
    header, *body = [
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in zip(("th", *["td"] * (len(table) - 1)), table, strict=True)
    ]
    pictures = "\n".join(
        f"<h2>{html.escape(title)}</h2>\n<img alt='{html.escape(title)}' src='data:image/png;base64,{_png(figure)}'>"
        for title, figure in figures.items()
    )
    return (
        "<!doctype html>\n<html lang='en'>\n<meta charset='utf-8'>\n<title>Comparison of runs</title>\n"
        f"<style>{_STYLE}</style>\n<h1>Comparison of runs</h1>\n"
        f"{_paragraph(above)}<p>Mean ± standard deviation over the seeds that completed.</p>\n"
        f"<div><table>\n{header}\n{''.join(body)}\n</table></div>\n{''.join(map(_paragraph, below))}{pictures}\n</html>\n"
    )


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>\n" if text else ""


def _png(figure: Figure) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=90)
    return base64.b64encode(data.getvalue()).decode()
