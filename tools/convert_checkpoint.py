#!/usr/bin/env python
"""tools/convert_checkpoint.py SRC DST --to hf|megatron [--parallel tp=N,pp=N,ep=N] [--dtype D]: the same as `megarl convert`."""

import sys

from megarl.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    main()
