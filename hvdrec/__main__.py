"""``python -m hvdrec`` is the command line."""

from hvdrec.cli import main

main()
