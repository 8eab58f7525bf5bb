"""`python -m stepladder`: the console script, by the interpreter that is asked."""

from stepladder.cli import main

main(prog_name="stepladder")
