"""`python -m ficpd` is the command `ficpd`."""

from ficpd.cli import main

main()
