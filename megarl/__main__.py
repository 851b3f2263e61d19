"""`python -m megarl`: the same as the `megarl` command, and what every rank runs."""

from megarl.cli import main

if __name__ == "__main__":
    main()
