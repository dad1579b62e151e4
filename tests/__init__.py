import functools

import pytest

# A parameter, or several, with which a test is left out of the default run.
thorough = functools.partial(pytest.param, marks=pytest.mark.thorough)
# As thorough, and left out of CI too.
slow = functools.partial(pytest.param, marks=[pytest.mark.thorough, pytest.mark.slow])


def by_default(values, *kept):
    """Returns all values as parameters of a test. The default run takes only those in `kept`."""
    as_tuple = lambda value: value if isinstance(value, tuple) else (value,)
    return [value if value in kept else thorough(*as_tuple(value)) for value in values]
