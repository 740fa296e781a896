"""`python -m streamcl.demo`."""

import typer

from streamcl.demo import command

typer.run(command)
