"""`python -m megatron_policysplit.cli`, which is `policysplit`."""

from megatron_policysplit.cli.main import main

if __name__ == "__main__":
    main()
