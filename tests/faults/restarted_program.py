"""A rank that meets the others twice: python -m tests.faults.restarted_program FOLDER, under torchrun with one restart.

In the second start rank 1 comes late, so that rank 0 looks for it before it has said where it is.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from megarl.config.schema import Parallel
from megarl.parallel import Mesh

if __name__ == "__main__":
    start, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    if start and rank:
        time.sleep(1)
    met = Mesh.build(Parallel(timeout_minutes=1)).all_gather_object((start, rank))
    if not start:
        os._exit(1)
    Path(sys.argv[1], f"rank{rank}").write_text(str(met))
