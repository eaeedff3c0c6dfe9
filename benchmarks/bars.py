"""Draw the table of requests in docs/measurements.md as bars.

python -m benchmarks.bars        # writes docs/images/requests.svg
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import Final

DOCS: Final = Path(__file__).resolve().parents[1] / "docs"
PICTURE: Final = DOCS / "images" / "requests.svg"

COLUMNS: Final = ("SQLite", "mcp-persist, SQLite", "Postgres", "mcp-persist, Postgres")
COLOURS: Final = ("#00695c", "#9e9e9e", "#1565c0", "#bdbdbd")

LEFT: Final = 270
UNIT: Final = 280
"""Width of a bar of the stock SDK's throughput."""
BAR: Final = 13
GAP: Final = 18
TOP: Final = 56


def rows() -> list[tuple[str, list[float]]]:
    """Return the rows of ratios to the stock SDK, where more is faster."""
    table = (DOCS / "measurements.md").read_text().partition("## Requests\n")[2].partition("\n## ")[0]
    found = []
    for line in table.splitlines():
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        ratios = [match[1] for cell in cells if (match := re.fullmatch(r"(\d\.\d+) \(\d\.\d+\)", cell))]
        if len(ratios) == len(COLUMNS):
            found.append((name.replace("`", ""), [float(ratio) for ratio in ratios]))
    return found


def picture() -> str:
    """Return the SVG."""
    data = rows()
    height = TOP + len(data) * (len(COLUMNS) * BAR + GAP) + 10
    width = LEFT + int(1.75 * UNIT)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"',
        ' font-family="sans-serif" font-size="12">',
        "<title>Throughput as a multiple of the stock SDK's</title>",
        f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>',
    ]
    for number, (name, colour) in enumerate(zip(COLUMNS, COLOURS, strict=True)):
        x = 12 + number * 165
        shown = name if name.startswith("mcp") else f"this package, {name}"
        lines.append(f'<rect x="{x}" y="12" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{x + 17}" y="22" fill="#212121">{escape(shown)}</text>')
    stock = LEFT + UNIT
    lines.append(
        f'<line x1="{stock}" y1="{TOP - 8}" x2="{stock}" y2="{height - 20}" stroke="#d84315" stroke-dasharray="4 3"/>'
    )
    lines.append(f'<text x="{stock + 4}" y="{TOP - 8}" fill="#d84315">1: the stock SDK</text>')
    y = TOP
    for name, ratios in data:
        lines.append(
            f'<text x="{LEFT - 10}" y="{y + 2 * BAR + 4}" text-anchor="end" fill="#212121">{escape(name)}</text>'
        )
        for ratio, colour in zip(ratios, COLOURS, strict=True):
            bar = round(ratio * UNIT)
            lines.append(f'<rect x="{LEFT}" y="{y}" width="{bar}" height="{BAR - 2}" fill="{colour}"/>')
            place = f'x="{LEFT + bar + 5}" y="{y + 10}" font-size="10" fill="#424242"'
            lines.append(f'<text {place} stroke="#ffffff" stroke-width="3" paint-order="stroke">{ratio:.2f}</text>')
            y += BAR
        y += GAP
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture())
