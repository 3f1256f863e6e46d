"""Runs the command line: `python -m irc`, also under torchrun and accelerate launch."""

from __future__ import annotations

import sys

from irc.cli import main

if __name__ == "__main__":
    sys.exit(main())
