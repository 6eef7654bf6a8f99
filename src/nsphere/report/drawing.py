"""How pictures are drawn: matplotlib figures as inline SVG that follows the page's fonts, colours and
width.

Text stays text, so a reader can select it and the browser chooses the font. Colours are written as CSS
variables with the drawing's own colour as the fallback, so that one picture serves a light and a dark page.
No global state of matplotlib is read or changed: figures are made directly, without pyplot.

Each arm has one style everywhere. Arms differ in lightness, dash and marker as well as in hue, so that they
can be told apart in greyscale and by colour-blind readers (hues after Okabe and Ito).
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from matplotlib import style as mpl_style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1d1f23", "#5d636d", "#dfe1e5"
CSS_NAMES = {INK: "--ink", MUTED: "--muted", GRID: "--grid"}

_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class ArmStyle:
    """How an arm is drawn, everywhere.

    Attributes:
        title: its name in prose.
        colour: on a light page.
        css: the CSS variable that replaces `colour`, and is lighter on a dark page.
        dashes: on and off lengths of its line; empty for a solid line.
        marker: matplotlib's name of the marker at its evaluations.
        width: of its line, in pixels.
    """

    title: str
    colour: str
    css: str
    dashes: tuple[float, ...]
    marker: str
    width: float


_STYLES = {
    "gpt": ArmStyle("GPT", "#5aa6d6", "--arm-sky", (1.2, 1.4), "o", 2.0),
    "gpt-qknorm": ArmStyle("GPT + QK-norm", "#0a3f7a", "--arm-navy", (5.0, 1.6), "s", 2.0),
    "ngpt": ArmStyle("nGPT", "#d4580a", "--arm-vermilion", (), "D", 2.4),
    "gpt-qknorm-muon": ArmStyle("GPT + QK-norm + Muon", "#007d61", "--arm-green", (6, 1.5, 1.2, 1.5), "^", 2.0),
}
_SPARE = (
    ArmStyle("", "#a8588f", "--arm-purple", (3.0, 1.2), "v", 2.0),
    ArmStyle("", "#7a6000", "--arm-olive", (8.0, 2.0), "P", 2.0),
    ArmStyle("", "#4d4d4d", "--arm-grey", (1.0, 2.5), "X", 2.0),
)
ARM_COLOURS = {style.css: style.colour for style in (*_STYLES.values(), *_SPARE)}


def arm_styles(names: Iterable[str]) -> dict[str, ArmStyle]:
    """A style for each arm: its own for the named arms, a spare one for any other."""
    styles: dict[str, ArmStyle] = {}
    for name in names:
        if name in _STYLES:
            styles[name] = _STYLES[name]
        else:
            spare = _SPARE[sum(known not in _STYLES for known in styles) % len(_SPARE)]
            styles[name] = ArmStyle(clean(name), *list(vars(spare).values())[1:])
    return styles


def clean(text: object) -> str:
    """Text that XML and UTF-8 can hold: control characters and lone surrogates become U+FFFD."""
    return re.sub(r"[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", str(text))


def count(value: float) -> str:
    """A number of tokens or parameters for people: `2.46 M`."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.99995:
            return f"{value / size:.3g} {suffix}"
    return f"{value:.3g}"


def power_of_ten(value: float, digits: int = 6) -> str:
    """A positive number as on a logarithmic axis: `10³`, and `2·10³` between the decades."""
    exponent = math.floor(math.log10(value) + 1e-9) if value > 0 else 0
    factor = value / 10.0**exponent
    if -1 <= exponent <= 1:
        return f"{value:.{digits}g}"
    power = "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if abs(factor - 1) < 1e-6 else f"{factor:.{digits}g}·{power}"


def line(style: ArmStyle) -> dict[str, Any]:
    """The arguments of `Axes.plot` for an arm's line."""
    return {
        "color": style.colour,
        "linestyle": (0, style.dashes) if style.dashes else "-",
        "linewidth": style.width,
        "marker": style.marker,
        "markersize": 5,
    }


@functools.cache
def swatch(style: ArmStyle) -> str:
    """An arm's line and marker for a legend in HTML."""

    def draw(axes: Axes) -> None:
        axes.axis("off")
        axes.plot([0, 1, 2], [0, 0, 0], **line(style), markevery=[1])
        axes.set(xlim=(0, 2), ylim=(-1, 1))

    return picture(f"swatch{style.css}", "", 34, 12, draw, bare=True)


def picture(
    name: str, label: str, width: float, height: float, draw: Callable[[Axes], None], bare: bool = False
) -> str:
    """Draw one panel and return it as an `<svg>` element for HTML.

    Args:
        name: prefix of the ids inside, unique on the page.
        label: what the picture says, for those who cannot see it; empty for decoration.
        width: natural width in CSS pixels, at which text is 12 px. The page may scale the picture.
        height: natural height in CSS pixels.
        draw: draws on the axes that it is given.
        bare: no axes around the drawing.
    """
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,
        "font.size": 12,
        "axes.titlesize": 12,
        "axes.titlelocation": "left",
        "axes.titlepad": 8,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": MUTED,
        "axes.titlecolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "axes.axisbelow": True,
        "axes.grid": not bare,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.major.size": 3,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
    }
    # From the defaults: a matplotlibrc of the user's own must not reach the report.
    with mpl_style.context(["default", settings]):
        figure = Figure(figsize=(width / 72, height / 72), layout=None if bare else "constrained")
        draw(figure.add_axes((0, 0, 1, 1)) if bare else figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _for_html(buffer.getvalue(), name, label)


def _for_html(svg: str, name: str, label: str) -> str:
    """An SVG document as an element of an HTML page: scalable, with the page's colours and fonts, and its own ids."""
    root = ElementTree.fromstring(svg)
    for part in list(root):
        # matplotlib's style sheet would apply to the whole page; the page's own says the same for pictures
        # only.
        if part.tag == f"{_SVG}metadata" or part.find(f"{_SVG}style") is not None:
            root.remove(part)
    for attribute in ("width", "height", "version"):
        del root.attrib[attribute]
    root.set("class", "panel")
    if label:
        root.set("role", "img")
        root.set("aria-label", clean(label))
    else:
        root.set("aria-hidden", "true")
    used = set(re.findall(r"#([A-Za-z_][\w.-]*)", svg))
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        if (key := element.attrib.pop("id", None)) in used:
            element.set("id", f"{name}-{key}")
        if target := element.attrib.pop(_HREF, None):
            element.set("href", f"#{name}-{target[1:]}")
        if clip := element.get("clip-path"):
            element.set("clip-path", clip.replace("url(#", f"url(#{name}-"))
        if style := element.get("style"):
            element.set("style", _with_variables(re.sub(r"font-family: [^;]*;? ?", "", style)))
    return ElementTree.tostring(root, encoding="unicode")


def _with_variables(style: str) -> str:
    names = CSS_NAMES | {colour: css for css, colour in ARM_COLOURS.items()}
    return re.sub(r"#[0-9a-f]{6}", lambda m: f"var({names[m[0]]}, {m[0]})" if m[0] in names else m[0], style)
