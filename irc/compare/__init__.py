"""`irc compare`: compares routing policies on one model and one text, every cell with the same budget."""
