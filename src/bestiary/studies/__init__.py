"""Experiments that leave result files: each a function from a frozen configuration to a folder."""
