"""`python -m siglip_model` is the command `siglip`."""

from siglip_model.cli.main import main

if __name__ == "__main__":
    main()
