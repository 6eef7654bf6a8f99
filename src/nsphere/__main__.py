"""`python -m nsphere`, which torchrun starts as `torchrun --nproc-per-node N -m nsphere`."""

from nsphere.cli import entry

if __name__ == "__main__":
    entry()
