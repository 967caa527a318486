"""The stages of the first GPU hour, as data: what runs in which process group, and for how long at most."""

from dataclasses import dataclass

STAGE_LIMIT_S = 480
TOTAL_LIMIT_S = 5400  # `make test-gpu`, on eight GPUs


@dataclass(frozen=True)
class Step:
    """One pytest process.

    Attributes:
        name: in reports and on the verification card.
        what: for the card's row, after "First GPU hour: ".
        tests: files, or files::tests.
        limit_s: seconds after which its process group is killed.
        figures: recorded properties that the card's row shows, where a test recorded them.
    """

    name: str
    what: str
    tests: tuple[str, ...]
    limit_s: int
    figures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """Steps that belong together; a stage of one GPU ends within `STAGE_LIMIT_S`."""

    title: str
    steps: tuple[Step, ...]

    @property
    def limit_s(self) -> int:
        return sum(step.limit_s for step in self.steps)


STAGES = {
    "1": Stage(
        "versions, kernels against their references",
        (
            Step(
                "versions", "versions and what they lack", ("tests/gpu/test_versions.py",), 60, ("lacking",)
            ),
            Step(
                "kernels",
                "FP8 kernels against their references, with an unpromoted product that must fail",
                ("tests/gpu/test_fp8_kernels.py",),
                270,
                ("promoted_error", "unpromoted_error", "bound"),
            ),
            Step(
                "sanitizer",
                "kernels on tiny shapes under compute-sanitizer, with a planted fault that must be found",
                ("tests/gpu/test_sanitizer.py",),
                150,
                ("sanitizer", "faults", "planted"),
            ),
        ),
    ),
    "2": Stage(
        "speeds against scaled_mm, bf16 and the copy limit",
        (
            Step(
                "speeds",
                "speeds of kernels and products",
                ("tests/gpu/test_speeds.py",),
                420,
                ("copy_GB_per_s", "bf16_TFLOP_per_s", "scaled_mm_TFLOP_per_s", "kernel_TFLOP_per_s"),
            ),
        ),
    ),
    "3": Stage(
        "the trainer on one GPU",
        (
            Step(
                "trainer",
                "trainer against the CPU's: losses, first-step gradients, checkpoint from GPU to CPU",
                ("tests/gpu/test_one_gpu.py",),
                240,
                ("largest_loss_difference", "worst_gradient", "lost_microbatch", "after_loading"),
            ),
            Step(
                "pairs",
                "overlapped pair in one process",
                ("tests/gpu/test_pairs.py",),
                60,
                ("overlap_share",),
            ),
            Step(
                "shared",
                "several ranks on one GPU under every schedule",
                ("tests/gpu/test_shared_gpu.py",),
                180,
                ("carried_by", "largest_loss_difference", "worst_gradient"),
            ),
        ),
    ),
    "4": Stage(
        "Transformer Engine",
        (
            Step(
                "te-layers",
                "reference backend against Transformer Engine: layers, FP8, optimizer",
                ("tests/gpu/test_backends.py", "tests/gpu/test_fp8.py", "tests/gpu/test_optimizer.py"),
                240,
                ("loss_error_te", "loss_error_reference_bf16", "loss_error_emulated"),
            ),
            Step(
                "te-trainer",
                "trainer on one GPU, reference backend against Transformer Engine",
                ("tests/gpu/test_trainer.py::test_losses[1]",),
                210,
                ("largest_relative_difference",),
            ),
        ),
    ),
    "gpus": Stage(
        "several GPUs",
        (
            Step(
                "trainer-gpus",
                "trainer on 2, 4 and 8 GPUs against one",
                tuple(f"tests/gpu/test_trainer.py::test_losses[{count}]" for count in (2, 4, 8)),
                900,
                ("largest_relative_difference", "worst_gradient"),
            ),
            Step(
                "schedules",
                "every schedule against 1F1B, on 2, 4 and 8 GPUs",
                ("tests/gpu/test_trainer.py::test_schedules",),
                1350,
                ("largest_relative_difference", "worst_gradient"),
            ),
            Step(
                "deepep",
                "DeepEP against all-to-all, on 2, 4 and 8 GPUs",
                ("tests/gpu/test_trainer.py::test_deepep",),
                600,
                ("largest_relative_difference",),
            ),
            Step(
                "dispatch",
                "two hops and experts that move against all-to-all with fixed experts, on 2, 4 and 8 GPUs",
                ("tests/gpu/test_dispatch.py",),
                540,
                ("largest_relative_difference", "worst_gradient"),
            ),
            Step("ema", "average of the weights on a GPU", ("tests/ema/test_average.py",), 120),
        ),
    ),
}


def all_steps() -> list[tuple[str, Step]]:
    """(stage, step) in the order in which they run."""
    return [(name, step) for name, stage in STAGES.items() for step in stage.steps]
