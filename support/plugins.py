"""Code that a flag names: an object in any module, and the domains in domains/."""
import importlib
import inspect
import re
from pathlib import Path

from support.errors import InputError

DOMAINS = Path(__file__).resolve().parent.parent / "domains"


def load_object(spec, flag=""):
    """What `MODULE:NAME` names, as in "domains.safety:Judge".

    flag: the flag that gave it, for errors. Raises InputError for another form, a module that is
    not there or lacks one that it imports, and a name that the module does not have.

    >>> load_object("math:tau")
    6.283185307179586
    """
    given = f"{flag} {spec}".strip()
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", spec):
        raise InputError(f"{given}: write MODULE:NAME, as in package.module:name.")
    module_name, _, name = spec.partition(":")
    module = load_module(module_name, given)
    try:
        return getattr(module, name)
    except AttributeError:
        raise InputError(f"{given}: {module.__file__} has no `{name}`. Check the name.") from None


def source_file(function, spec):
    """The file that a function is written in. Raises InputError for anything else.

    >>> Path(source_file(load_object, "")).name
    'plugins.py'
    """
    if not inspect.isfunction(function):
        raise InputError(f"{spec}: not a function in Python. Name one.")
    return inspect.getsourcefile(function)


def load_module(name, given):
    """A module by its name; given: what asked for it. Raises InputError where it is not there."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
    if missing == name or name.startswith(f"{missing}."):
        raise InputError(
            f"{given}: there is no module {missing}. Run the command in the folder that holds it, "
            "or add that folder to PYTHONPATH."
        )
    raise InputError(f"{given}: {name} imports {missing}, which is not installed. Install it.")


def load_domain(name, flag="--domain"):
    """The module of a domain, domains/NAME.py. Raises InputError that lists those there are."""
    if name not in domain_names():
        known = ", ".join(domain_names())
        raise InputError(f"{flag} {name}: no such domain. There are {known}; see domains/.")
    return load_module(f"domains.{name}", f"{flag} {name}")


def domain_names():
    """The names of all domains."""
    paths = DOMAINS.glob("[a-z]*.py")
    return sorted(path.stem for path in paths)
