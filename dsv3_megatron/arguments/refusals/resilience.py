"""Options for failures that cannot work as given."""

from dsv3_megatron.arguments.refusals.table import Refusal

FEATURE = "Resilience"

ROWS = (
    Refusal(
        "rewind_without_save",
        FEATURE,
        "--on-bad-step",
        "{on_bad_step}",
        lambda a, s: a.on_bad_step == "rewind" and not a.save,
        "there will be no checkpoint to go back to",
        "--save DIR and --save-interval as well, or --on-bad-step skip",
        "--on-bad-step rewind",
    ),
    Refusal(
        "action_without_check",
        FEATURE,
        "--on-bad-step",
        "{on_bad_step}",
        lambda a, s: (
            a.on_bad_step != "stop" and not a.check_for_nan_in_loss_and_grad and a.loss_spike_factor is None
        ),
        "no step is looked at with --no-check-for-nan-in-loss-and-grad",
        "the default, which looks for NaN, or --loss-spike-factor",
        "--on-bad-step skip --no-check-for-nan-in-loss-and-grad",
    ),
    Refusal(
        "spike_factor",
        FEATURE,
        "--loss-spike-factor",
        "{loss_spike_factor}",
        lambda a, s: a.loss_spike_factor is not None and a.loss_spike_factor <= 1,
        "every other step would be a spike",
        "a factor above 1, for instance 2",
        "--loss-spike-factor 0.9",
    ),
    Refusal(
        "rank_timeout",
        FEATURE,
        "--rank-timeout-s",
        "{rank_timeout_s}",
        lambda a, s: a.rank_timeout_s <= 0,
        "every rank would be lost at once",
        "seconds, for instance 120",
        "--rank-timeout-s 0",
    ),
)
