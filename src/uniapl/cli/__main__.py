"""`python -m uniapl.cli`, for torchrun and accelerate launch."""

from uniapl.cli import main

if __name__ == "__main__":
    main()
