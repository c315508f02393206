"""`python -m sft_dist`, the same as `sft-dist`."""

from sft_dist.cli import main

if __name__ == "__main__":
    main()
