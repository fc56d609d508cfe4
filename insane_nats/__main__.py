"""`python -m insane_nats …` is the command `insane-nats …`."""

from insane_nats.cli import main

if __name__ == "__main__":
    main()
