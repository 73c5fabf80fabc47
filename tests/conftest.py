"""What all tests share without asking for it."""

import gc


def pytest_collection_finish() -> None:
    """Leave imported objects to no collector: each training run ends with a collection, most of it spent on them."""
    gc.freeze()
