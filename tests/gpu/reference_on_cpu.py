"""A rank of `verify layouts` whose single process is the CPU's: `python -m tests.gpu.reference_on_cpu verify layout-rank ...`.

Every other layout, those of one process too, runs on CUDA.
"""

from __future__ import annotations

import os
import sys

from megarl.verify.layouts.names import REFERENCE


def main() -> None:
    if sys.argv[-1] == REFERENCE:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from megarl.cli import main as megarl

    megarl()


if __name__ == "__main__":
    main()
