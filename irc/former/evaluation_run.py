"""Formerly `irc.evaluation_run`; now `irc.evaluation.run`."""

from irc.evaluation.run import open_model, run_evaluation

__all__ = ["open_model", "run_evaluation"]
