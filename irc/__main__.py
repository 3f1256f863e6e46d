"""Runs the command line as `python -m irc`, which torchrun and accelerate launch can start."""

from __future__ import annotations

import sys

from irc.cli import main

if __name__ == "__main__":
    sys.exit(main())
