import functools

import pytest

# Parameters of which a test is left out of the default run.
thorough = functools.partial(pytest.param, marks=pytest.mark.thorough)
