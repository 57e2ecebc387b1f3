"""`python -m checkpoints_conv`: the commands of `policysplit convert`."""

from megatron_policysplit.cli.convert import main

if __name__ == "__main__":
    main()
