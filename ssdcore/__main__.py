"""`python -m ssdcore`: the command line where the script is not on the path."""

from ssdcore.cli import main

main()
