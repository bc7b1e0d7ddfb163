"""`python -m devmon.cli`."""

from devmon.cli.root import main

main()
