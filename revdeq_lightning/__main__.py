"""`python -m revdeq_lightning`: see `cli.py`."""

from revdeq_lightning.cli import main

if __name__ == "__main__":
    main()
