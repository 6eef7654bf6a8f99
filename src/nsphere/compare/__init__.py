"""The main job: arms trained side by side on the same batches, and what each needed to get where.

config.py      what is asked for
comparison.py  the runs of every arm, the timing of all, and the folder they leave
lr_sweep.py    a grid of learning rates that grows until the best lies inside
summary.py     summary.json: what was found, as numbers

The page and the table of a summary are made in nsphere.report.
"""

from nsphere.compare.comparison import compare
from nsphere.compare.config import CompareConfig

__all__ = ["CompareConfig", "compare"]
