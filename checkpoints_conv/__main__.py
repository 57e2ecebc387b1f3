"""`python -m checkpoints_conv`: the commands of `policysplit convert`."""

import sys

BAD_INPUT = 2  # the exit code that `policysplit` has for it, too


def main() -> None:
    """Run the command line, the only part of this package that needs megatron_policysplit."""
    try:
        from megatron_policysplit.cli.convert import main as convert
    except ModuleNotFoundError as error:
        # A module that megatron_policysplit itself lacks is another matter, and says so by itself.
        if error.name != "megatron_policysplit":
            raise
        print(
            "error: the commands of python -m checkpoints_conv need megatron_policysplit, which is "
            "not installed; install it, or call checkpoints_conv.hf_to_megatron.hf_to_megatron and "
            "the like from Python",
            file=sys.stderr,
        )
        sys.exit(BAD_INPUT)
    convert()


if __name__ == "__main__":
    main()
