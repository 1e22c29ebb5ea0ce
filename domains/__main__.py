"""The defaults of a domain, as shell assignments that run.sh evaluates.

    python -m domains safety      # those that the environment does not give
"""
import argparse
import os
import shlex

from support.errors import exit_cleanly
from support.plugins import domain_names, load_domain

# `BENIGN=` is no stage 2, for instance; of other variables an empty one is not given.
MAY_BE_EMPTY = ("ALSO", "BENIGN", "EVAL", "TEACHER")
# What suits the domain's own model, and no other.
OF_ITS_MODEL = (
    "ALSO", "BATCH", "LIMIT_SETS", "LR", "LRS", "TEACHER", "TOKENS", "TRAIN_ARGS", "VALID",
)


def defaults(domain, environment):
    """{variable: default} of all that the environment does not give.

    domain: a module; its texts with names in capitals are its defaults.
    """
    own_model = environment.get("MODEL") in (None, "", domain.MODEL)
    found = {}
    for name, value in vars(domain).items():
        if not name.isupper() or not isinstance(value, str):
            continue
        given = environment.get(name)
        if given or (given == "" and name in MAY_BE_EMPTY):
            continue
        if own_model or name not in OF_ITS_MODEL:
            found[name] = value
    return found


def main(argv=None):
    """Print the assignments, one a line."""
    parser = argparse.ArgumentParser(prog="python -m domains", description=__doc__.split("\n")[0])
    parser.add_argument("domain", help=", ".join(domain_names()))
    args = parser.parse_args(argv)
    domain = load_domain(args.domain, "DOMAIN")
    for name, value in defaults(domain, os.environ).items():
        print(f"{name}={shlex.quote(value)}")


if __name__ == "__main__":
    exit_cleanly(main)
