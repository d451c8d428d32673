"""``python -m fasc_lightning``: the command ``fasc``."""

from fasc_command import main

if __name__ == "__main__":
    main()
