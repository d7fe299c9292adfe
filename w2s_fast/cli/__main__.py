"""`python -m w2s_fast.cli`, for where the installed command is not on the path."""

from w2s_fast.cli.app import app

app(prog_name="w2s-fast")
