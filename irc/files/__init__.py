"""Writing files atomically, and reading files that others wrote safely."""
