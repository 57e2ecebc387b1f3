"""Several methods over several seeds, each run a `policysplit train` of its own, and one report of
them all.
"""
