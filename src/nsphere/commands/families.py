"""`nsphere families`."""

from dataclasses import dataclass

from nsphere.commands.flags import parse
from nsphere.families import table


@dataclass(frozen=True)
class Families:
    """The published QK-norm variants that families.qk_norm knows, as a table."""


def main(argv: list[str]) -> None:
    parse(Families, "families", argv)
    print(table())
