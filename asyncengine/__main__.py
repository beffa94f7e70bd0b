"""``python -m asyncengine`` is the command ``asyncengine``."""

from asyncengine.cli import main

if __name__ == "__main__":
    main()
