"""`python -m tokenworks` is `tokenworks`."""

from tokenworks.cli.main import main

if __name__ == "__main__":
    main()
