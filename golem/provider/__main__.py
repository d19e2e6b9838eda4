"""`python -m golem.provider`: the same as `golem provider run`."""

from golem.cli import main

main(["provider", "run"], prog_name="golem")
