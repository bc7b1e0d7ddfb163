"""`python -m devmon`, the same as `devmon`."""

from devmon.cli import main

if __name__ == "__main__":
    main()
