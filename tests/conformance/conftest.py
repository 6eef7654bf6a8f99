"""Prints what the comparison with transformers covered, where it ran."""

import sys


def pytest_terminal_summary(terminalreporter):
    """The tables, after the tests."""
    attentions = sys.modules.get("hf_attentions")
    for title, lines in (attentions.REPORT if attentions else {}).items():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)
