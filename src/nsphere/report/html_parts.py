"""The parts of an HTML page that loads nothing and runs nothing: escaped text, tables, figures, and the style sheet.

The page's content security policy forbids scripts and every request, so that a sample of generated text can do no
harm even if it looks like HTML.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from nsphere.report.drawing import ARM_COLOURS, CSS_NAMES, arm_styles, clean, swatch

LIGHT = {"--paper": "#ffffff", "--soft": "#f5f6f8"}
LIGHT |= {css: colour for colour, css in CSS_NAMES.items()} | ARM_COLOURS
DARK = {
    "--paper": "#15171a",
    "--soft": "#1e2125",
    "--ink": "#e9eaec",
    "--muted": "#a3a9b3",
    "--grid": "#34383f",
    "--arm-sky": "#9bd3f7",
    "--arm-navy": "#5b97e0",
    "--arm-vermilion": "#ff8f45",
    "--arm-green": "#35c29c",
    "--arm-purple": "#d58bc0",
    "--arm-olive": "#cdb443",
    "--arm-grey": "#b5b5b5",
}


def escape(value: object) -> str:
    """Text as HTML shows it, whatever is in it."""
    return html.escape(clean(value))


def arm_title(name: str, arms: Iterable[str]) -> str:
    """An arm's name with a piece of its line before it."""
    style = arm_styles(arms)[name]
    return f"{swatch(style)} {escape(style.title)}"


def section(title: str, *content: str) -> str:
    """A part of the page under its heading; the content is HTML already."""
    return f"<section><h2>{escape(title)}</h2>{''.join(content)}</section>"


def pair(*figures: str) -> str:
    """Figures side by side where there is room, with their pictures on one line."""
    return f'<div class="pair">{"".join(figures)}</div>'


def table(head: Sequence[str], lines: Iterable[tuple[str, Sequence[str]]], kind: str = "") -> str:
    """A table with a head per column and per row; the cells are HTML already."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    rows = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for first, cells in lines
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def folded(title: str, content: str) -> str:
    """HTML that a reader opens when wanted."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def not_available(why: str) -> str:
    """What stands where a piece is missing."""
    return f'<p class="missing">Not available: {escape(why.rstrip("."))}.</p>'


def block(id: str, title: str, read: str, content: str) -> str:
    """A figure: its title, one sentence on what to read in it, and the content, which is HTML already."""
    caption = f"<h3>{escape(title)}</h3>" + (f"<p>{escape(read)}</p>" if read else "")
    return f'<figure id="{id}"><figcaption>{caption}</figcaption><div>{content}</div></figure>'


def figure(
    id: str,
    title: str,
    read: str,
    panels: Iterable[str],
    arms: Iterable[str],
    missing: str,
    numbers: str = "",
    small: bool = False,
) -> str:
    """A chart with its legend; or, where there is no picture, why there is none.

    Args:
        id: of the figure on the page.
        title: what is drawn.
        read: one sentence on what to read in it.
        panels: `<svg>` elements; empty ones are left out.
        arms: the arms in the legend.
        missing: why there is no picture, if all panels are empty.
        numbers: a table of what is drawn, folded away; empty for none.
        small: many small panels rather than one or two large ones.
    """
    drawn = [panel for panel in panels if panel]
    if not drawn:
        return block(id, title, "", not_available(missing))
    keys = "".join(f"<li>{arm_title(name, arms)}</li>" for name in arms)
    legend = f'<ul class="legend">{keys}</ul>' if keys else ""
    kind = "small" if small else "large" if len(drawn) > 1 else "one"
    pictured = f'<div class="panels {kind}">{"".join(drawn)}</div>'
    return block(id, title, read, legend + pictured + (folded("The numbers", numbers) if numbers else ""))


def html_page(title: str, body: Iterable[str]) -> str:
    """The whole document; `body` is HTML already."""
    light, dark = ("".join(f"{name}:{colour};" for name, colour in colours.items()) for colours in (LIGHT, DARK))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n"
        f"<style>:root{{{light}}}\n@media (prefers-color-scheme: dark){{:root{{{dark}}}}}\n{_CSS}</style>\n"
        "</head>\n<body>\n" + "\n".join(part for part in body if part) + "\n</body>\n</html>\n"
    )


_CSS = """
*{box-sizing:border-box}
html{background:var(--paper);color:var(--ink);-webkit-text-size-adjust:100%}
body{font:1rem/1.55 -apple-system,"Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",Arial,sans-serif;
 max-width:73rem;margin:0 auto;padding:clamp(1.25rem,4vw,3.5rem) clamp(.9rem,3vw,2.5rem) 5rem;
 font-variant-numeric:tabular-nums}
h1{font-size:clamp(1.6rem,1.05rem + 2.3vw,2.75rem);line-height:1.16;letter-spacing:-.018em;font-weight:680;
 max-width:25em;margin:.4rem 0 1.2rem;text-wrap:balance}
h2{font-size:1.4rem;line-height:1.25;letter-spacing:-.01em;margin:3.6rem 0 1.2rem;padding-top:1.1rem;
 border-top:1px solid var(--grid)}
h3{font-size:1.02rem;line-height:1.3;margin:0}
p,ul{max-width:44em;margin:.5rem 0}
li{margin:.35rem 0}
.kicker{max-width:none;color:var(--muted);font-size:.88rem;margin:0}
.lead{font-size:1.08rem;text-wrap:pretty}
.pair,.panels,.samples{display:grid;gap:2.4rem 3rem;grid-template-columns:minmax(0,1fr)}
.panels{gap:1rem 1.6rem;justify-items:start}
.panels.small{grid-template-columns:repeat(2,minmax(0,1fr));gap:.8rem}
figure{margin:0 0 2.6rem;min-width:0}
.pair figure{margin-bottom:0}
figcaption p{color:var(--muted);font-size:.93rem;line-height:1.45;margin:.2rem 0 .7rem;text-wrap:pretty}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.3rem;padding:0;margin:.2rem 0
.6rem;font-size:.9rem} .legend li{margin:0}
.panel{display:block;width:100%;height:auto;max-width:36rem}
.panel *{stroke-linejoin:round;stroke-linecap:butt}
svg[aria-hidden]{display:inline-block;width:2.1rem;max-width:none;vertical-align:-.1em}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem;line-height:1.4;margin:.4rem 0 1rem}
th,td{padding:.42rem .6rem .42rem 0;text-align:right;vertical-align:top;border-bottom:1px solid var(--grid)}
th{font-weight:400}
thead th{font-weight:620;vertical-align:bottom}
tbody th,thead th:first-child{text-align:left;color:var(--muted);min-width:6.5rem}
tbody th{position:sticky;left:0;background:var(--paper)}
td{white-space:nowrap}
table.words :is(td,thead th):last-child{text-align:left}
table.words td:last-child{white-space:normal}
td small{display:block;color:var(--muted);font-size:.8rem;font-weight:400}
dl{margin:.4rem 0 1rem;max-width:60rem}
.arms-side{display:grid;gap:1.2rem 3.5rem;grid-template-columns:minmax(0,1fr)}
dt{font-weight:620}
dd{margin:0 0 .6rem;overflow-wrap:anywhere}
dl.facts dt{font-weight:400;color:var(--muted)}
code,pre{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace;font-size:.86rem}
dt code{color:var(--muted);font-weight:400}
pre{background:var(--soft);border-radius:6px;padding:.8rem 1rem;margin:.5rem 0;white-space:pre-wrap;
 overflow-wrap:anywhere;max-height:22rem;overflow-y:auto;line-height:1.45}
details{margin:.4rem 0}
summary{cursor:pointer;color:var(--muted);font-size:.9rem}
.big{font-size:1.5rem;font-weight:620;margin-right:.5rem}
.missing{color:var(--muted);font-style:italic}
@media (min-width:44rem){
 dl.facts{display:grid;grid-template-columns:10rem 1fr;gap:.15rem 1rem}
 dl.facts dd{margin:0}
 .panels.small{grid-template-columns:repeat(3,minmax(0,1fr));gap:1.2rem}
 table{font-size:.94rem}
 th,td{padding-right:1.6rem}
}
@media (min-width:56rem){
 .arms-side{grid-template-columns:minmax(0,max-content) minmax(14rem,1fr)}
 .pair figure{display:grid;grid-row:span 2;grid-template-rows:subgrid;row-gap:0}
 .pair,.panels.large{grid-template-columns:repeat(2,minmax(0,1fr))}
 .samples{grid-template-columns:repeat(auto-fit,minmax(20rem,1fr));gap:1.5rem}
 .panels.small{grid-template-columns:repeat(4,minmax(0,1fr))}
}
@media print{details{display:none}pre{max-height:none}section{break-inside:auto}figure{break-inside:avoid}}
"""
