"""`irc bench`: what routing gains in wall-clock time, against what its FLOPs promise.

`shapes` says what is timed, `models` writes it to disk, `contenders` run it, `measure` times them in turns, `ideal`
says what skipping could gain at most, `stage` brings one point together and `run` all of them.
"""

from irc.bench.run import Subject, bench
from irc.bench.scenario import Load, Share

__all__ = ["Load", "Share", "Subject", "bench"]
