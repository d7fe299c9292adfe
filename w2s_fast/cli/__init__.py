"""Cli: the `w2s-fast` command.

Owns options and their defaults, files of prompts and of results, and what is printed where. torch
and transformers take seconds to import, so no file here imports them at its top: `w2s-fast --help`
and a mistyped option answer at once.
"""

from w2s_fast.cli.app import app
from w2s_fast.cli.threads import let_threads_sleep, take_usable_cores

__all__ = ["app", "let_threads_sleep", "take_usable_cores"]
