"""`python -m nsnd` is the command nsnd."""

from nsnd.cli import main

main()
