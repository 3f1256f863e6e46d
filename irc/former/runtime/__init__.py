"""Modules of `irc.runtime` under the names that they had in version 0.1."""
