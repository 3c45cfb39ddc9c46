"""``python -m oscar_kv``: the command line."""

from oscar_kv.cli import main

if __name__ == "__main__":
    main()
