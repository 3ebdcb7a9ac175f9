"""``python -m loraloom`` is the command ``loraloom``; ``accelerate launch -m loraloom`` uses it."""

from loraloom.cli import main

if __name__ == "__main__":
    main()
