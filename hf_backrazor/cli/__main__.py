"""`python -m hf_backrazor.cli`."""

from . import main

if __name__ == "__main__":
    main()
