"""Thin: `nsphere bench step`, from a checkout."""

import sys

from nsphere.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "step", *sys.argv[1:]]))
