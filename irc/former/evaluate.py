"""Formerly `irc.evaluate`; now `irc.evaluation.perplexity`."""

from irc.evaluation.perplexity import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
