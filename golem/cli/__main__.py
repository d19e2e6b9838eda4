"""`python -m golem.cli`."""

from golem.cli import main

main(prog_name="golem")
