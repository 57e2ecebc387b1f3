"""Studies: several methods over several seeds, each run a `policysplit train`, and one report."""
