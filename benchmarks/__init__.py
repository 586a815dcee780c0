"""Whole runs that show what the project does, and at what speed."""
