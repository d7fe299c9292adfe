"""Cli: the `w2s-fast` command.

Owns options and their defaults, files of prompts and of results, and what is printed where. torch
and transformers take seconds to import, so no file here imports them at its top: `w2s-fast --help`
and a mistyped option answer at once.
"""

from w2s_fast.cli.app import app

__all__ = ["app"]
