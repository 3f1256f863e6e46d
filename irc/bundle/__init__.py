"""Bundles: what `irc convert` writes and `irc.load` reads."""
