"""What a comparison found, told: one self-contained HTML page, and the same in short for the terminal.

pages.py           the two pages, of a comparison and of the inside of one model, section by section
terminal.py        what nsphere compare and nsphere inspect print
verdict.py         the answer in words
arms_table.py      the table of the arms, and their recipes
inside_figures.py  the figures of the inside of trained models
pictures.py        each chart
drawing.py         how charts are drawn: an arm's style, matplotlib to inline SVG
html_parts.py      the parts of a page, and its style sheet
curves.py          the arithmetic: what each arm needs to reach each loss
"""

from nsphere.report.pages import write_inspection, write_report

__all__ = ["write_inspection", "write_report"]
