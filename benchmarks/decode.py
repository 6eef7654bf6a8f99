"""Thin: `nsphere bench decode`, from a checkout."""

import sys

from nsphere.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "decode", *sys.argv[1:]]))
