"""`python -m prefixattn.bench`: the command without the rest of `prefixattn`."""

from prefixattn.bench.cli import app

app(prog_name="prefixattn bench")
