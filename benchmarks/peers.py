"""Thin: `nsphere bench peers`, from a checkout."""

import sys

from nsphere.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "peers", *sys.argv[1:]]))
