"""`python -m thinwire` is the command `thinwire`."""

from thinwire.cli.main import main

if __name__ == "__main__":
    main()
