"""Modules under the names that they had in version 0.1, for code that imports them; docs/migration.md lists them."""
