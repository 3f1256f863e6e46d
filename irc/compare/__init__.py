"""`irc compare`: the policies against each other on one model and one text, every cell under the same budget."""
