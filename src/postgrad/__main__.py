"""`python -m postgrad` and `torchrun -m postgrad`."""

from postgrad.cli import main

if __name__ == "__main__":
    main()
