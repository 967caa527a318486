from collections.abc import Iterator

import pytest

from tests.fp8.kernels.interpreter import Interpreter


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Interpreter]:
    """Calls the kernels in Triton's interpreter, with conversions as exact as the hardware's."""
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()
