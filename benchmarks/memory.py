"""Thin: `nsphere bench memory`, from a checkout."""

import sys

from nsphere.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "memory", *sys.argv[1:]]))
