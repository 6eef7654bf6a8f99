"""What the scripts of this folder share; it lives in the package, so that `nsphere bench` has it too."""

from nsphere.bench.harness import finish, interleave, milliseconds, quartiles, ratios, spread, synchronize

__all__ = ["finish", "interleave", "milliseconds", "quartiles", "ratios", "spread", "synchronize"]
