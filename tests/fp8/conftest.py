from tests.specs.conftest import fresh_trackers, single_rank  # noqa: F401  (fixtures)
