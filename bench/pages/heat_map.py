"""What a sweep found at a glance."""

import math
import statistics


def heat_map(rows: list[dict]) -> str:
    """SVG: ops and dtypes down, FLOPs across; a cell's colour and number are its median ratio."""
    names = list(dict.fromkeys((r["op"], r["dtype"]) for r in sorted(rows, key=lambda r: r["op"])))
    decades = range(4, 13)
    cells = [
        f'<text x="{230 + 64 * i}" y="16" text-anchor="middle">1e{d}</text>'
        for i, d in enumerate(decades)
    ]
    for line, (op, dtype) in enumerate(names):
        y = 24 + 22 * line
        cells.append(f'<text x="4" y="{y + 15}">{op} {dtype}</text>')
        for i, decade in enumerate(decades):
            found = [
                r["ratio"]
                for r in rows
                if (r["op"], r["dtype"]) == (op, dtype) and int(math.log10(r["flops"])) == decade
            ]
            if not found:
                continue
            median = statistics.median(found)
            strength = min(1.0, abs(math.log2(median)) / 2)
            hue = 140 if median >= 1 else 10
            cells.append(
                f'<rect x="{200 + 64 * i}" y="{y}" width="62" height="20" '
                f'fill="hsl({hue},70%,{95 - 45 * strength:.0f}%)"/>'
                f'<text x="{231 + 64 * i}" y="{y + 15}" text-anchor="middle">{median:.2f}</text>'
            )
    size = f'width="{210 + 64 * len(decades)}" height="{30 + 22 * len(names)}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} '
        f'font-family="sans-serif" font-size="12">\n' + "\n".join(cells) + "\n</svg>\n"
    )
