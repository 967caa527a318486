"""What of the ramp a layout can run: against the definition of a valid batch, and the published layout."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.pipeline import build_schedule
from dsv3_megatron.recipe.arguments import first_sample
from dsv3_megatron.recipe.plan import Replicas, first_misfit, plan
from dsv3_megatron.recipe.schedules import Schedules

PUBLISHED = Replicas(128, pipeline_ranks=16, schedule="dualpipe", block=64)
RAMP = Schedules().ramp


def test_published_layout_needs_half_the_ranks_at_first() -> None:
    """3072 sequences are 24 for each of 128 ranks, and DualPipe on 16 needs 32."""
    first, second = plan(RAMP, PUBLISHED)
    assert (first.first_step, first.batch_sizes) == (0, (3072, 3840))
    assert first.replicas is not None and first.replicas.data_parallel_size == 64
    assert second.replicas == PUBLISHED and second.batch_sizes[0] == 4608
    assert PUBLISHED.microbatches(15360) == (120, 0)  # as published

    misfit = first_misfit(RAMP, PUBLISHED)
    assert misfit is not None and misfit.batch_sizes == (3072,) and misfit.replicas == first.replicas
    # From the second phase's checkpoint on all ranks may be used; one step earlier not yet.
    assert first_misfit(RAMP, PUBLISHED, second.first_sample) is None
    assert first_misfit(RAMP, PUBLISHED, second.first_sample - 1) is not None
    assert first_misfit(RAMP, Replicas(128, 16, "1f1b", block=64)) is None


def test_a_batch_that_no_number_of_ranks_can_run() -> None:
    ramp = Schedules(batch_ramp=(1000, 14360)).ramp
    (misfit, *_) = plan(ramp, PUBLISHED)
    assert misfit.replicas is None


@given(
    st.integers(1, 200),
    st.integers(1, 12),
    st.integers(1, 3),
    st.sampled_from([2, 4]),
    st.sampled_from(["dualpipe", "dualpipev", "zb1p"]),
)
def test_fits_means_that_the_schedule_can_be_built(batch, dp, micro, ranks, schedule) -> None:
    """`build_schedule` itself refuses too few microbatches, and an odd number for two directions."""
    replicas = Replicas(dp, ranks, schedule, micro)
    whole = batch % (micro * dp) == 0
    try:
        count = batch // (micro * dp)
        built = count > 0 and build_schedule(schedule, ranks, count) is not None
    except ValueError:
        built = False
    assert replicas.fits(batch) == (whole and built)


def test_the_check_begins_where_the_checkpoint_left_off(tmp_path) -> None:
    """The same command on all ranks is refused at first, and accepted from the second phase's checkpoint on."""
    args = SimpleNamespace(load=str(tmp_path), finetune=False, ckpt_step=None)
    assert first_sample(args, RAMP) == 0  # nothing there yet
    for step, fits in ((4193, False), (4194, True)):
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(f"{step}\n")
        assert (first_misfit(RAMP, PUBLISHED, first_sample(args, RAMP)) is None) == fits
    assert first_sample(SimpleNamespace(load=str(tmp_path), ckpt_step=2000), RAMP) == 2000 * 3072
    assert first_sample(SimpleNamespace(load=str(tmp_path), finetune=True), RAMP) == 0
