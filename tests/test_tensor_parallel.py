"""What ranks can't share is refused before any of them is needed; what they share is in tests/distributed."""

from typing import Any

import pytest

from nsphere.norms import RMSNorm
from nsphere.qk_norm import QKNorm
from nsphere.tensor_parallel import parallelize_qk_norm


class TwoRanks:
    """A mesh of which only the size may be asked."""

    def size(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_cast": "before"}, "with weight_cast='before' rounds between its steps"),
        ({"weight_cast": "after"}, "with weight_cast='after' rounds between its steps"),
        ({"multiplier": 2.0, "multiplier_place": "before_rope"}, 'multiplier_place="before_rope" can\'t be had'),
        ({"multiplier": 2.0, "multiplier_dtype": "input"}, 'multiplier_dtype="input" and multiplier_place="last" can'),
        ({"q": None, "k": RMSNorm(16)}, "a norm over all heads of q or k alone can't be split"),
        ({"num_heads": 3}, "num_heads 3 is not divisible by tp 2"),
        ({"over": 16, "num_heads": 8}, "over=16 spans heads of several ranks"),
    ],
)
def test_a_full_width_norm_that_ranks_would_compute_otherwise_is_refused(options: dict[str, Any], message: str) -> None:
    qk_norm = QKNorm(**{"q": "rms", "head_dim": 4, "num_heads": 4, "over": "full", **options})
    with pytest.raises(ValueError, match=message):
        parallelize_qk_norm(qk_norm, TwoRanks())
