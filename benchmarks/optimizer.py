"""Thin: `nsphere bench optimizer`, from a checkout."""

import sys

from nsphere.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "optimizer", *sys.argv[1:]]))
