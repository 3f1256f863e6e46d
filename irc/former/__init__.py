"""Modules under the names that they had in version 0.1, for code that imports them; see docs/migration.md."""
