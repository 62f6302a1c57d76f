"""`python -m ssdcore` runs the command line, also where the `ssdcore` script is not on the PATH."""

from ssdcore.cli import main

main()
