"""`python -m prefixattn`: the command, where its script is not on the path."""

from prefixattn.cli import app

app(prog_name="prefixattn")
