"""Other classes in the place of a script's own, to watch a run that is otherwise as it is."""

import contextlib


@contextlib.contextmanager
def replaced(owner, **values):
    """Give the owner's attributes other values inside."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)
