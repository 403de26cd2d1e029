"""Run the command line as ``python -m hvdrec``."""

from hvdrec.cli import main

main()
