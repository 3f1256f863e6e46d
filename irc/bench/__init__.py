"""`irc bench`: measures the speed-up of routing, and compares it with the speed-up that FLOPs and bytes allow.

`shapes` describes the models, `models` writes them to disk, `timed_models` runs them, `measure` times them in turns,
`ideal_speedup` computes the largest possible speed-up, `scenario` times one model at one sparsity, and `run` times all.
"""

from irc.bench.run import BenchOptions, Subject, bench
from irc.bench.scenario import Load, Share

__all__ = ["BenchOptions", "Load", "Share", "Subject", "bench"]
