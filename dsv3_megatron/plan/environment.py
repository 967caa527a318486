"""What a job's environment says of a step: Transformer Engine's switches of attention, and what is not planned."""

from collections.abc import Mapping, Sequence

from dsv3_megatron.adopt.launcher import OF_STEP
from dsv3_megatron.adopt.translate import options_of
from dsv3_megatron.plan.job import PlanError

BACKEND = "--attention-backend"
# By backend, the switches as Megatron sets them; it refuses one that is set otherwise
# (`LanguageModule._set_attention_backend`).
_SWITCHES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
_BACKENDS = {
    "auto": ("1", "1", "1"),
    "flash": ("1", "0", "0"),
    "fused": ("0", "1", "0"),
    "unfused": ("0", "0", "1"),
    "local": ("0", "0", "0"),
}
# Of Transformer Engine's, those that a step's time does not depend on.
_WITHOUT_TIME = (
    "NVTE_DEBUG",
    "NVTE_FRAMEWORK",
    "NVTE_BUILD",
    "NVTE_CPU_OFFLOAD_V1",
    "NVTE_FP8_BLOCK_SCALING_FP32_",
)
# Of others, what says the same to the planner.
_SAID_BY = {"NVTE_NORM_FWD_USE_CUDNN": "software.norm_quantises=true"}


def attention_of(env: Mapping[str, str], words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words with the backend that the switches choose, and what to say of it.

    Raises:
        PlanError: a switch that is none, leaves no backend, or contradicts `--attention-backend`.
    """
    said = {name: env[name] for name in _SWITCHES if name in env}
    for name, value in said.items():
        if value not in ("0", "1"):
            raise PlanError(f"{name}={value}: use {name}=0 or {name}=1")
    if not said:
        return list(words), []
    values = options_of(words)[0].get(BACKEND, [])
    if values and values[0] in _BACKENDS:
        for name, expected in zip(_SWITCHES, _BACKENDS[values[0]], strict=True):
            if said.get(name, expected) != expected:
                raise PlanError(
                    f"{name}={said[name]}: {BACKEND} {values[0]} sets it to {expected}, and Megatron refuses both; "
                    f"leave {name} out"
                )
        return list(words), []
    shown = " ".join(f"{name}={value}" for name, value in said.items())
    state = tuple(said.get(name, "1") for name in _SWITCHES)
    if state == _BACKENDS["local"]:
        raise PlanError(f"{shown}: leaves Transformer Engine no attention; use {BACKEND} unfused")
    backend = next((name for name, switches in _BACKENDS.items() if switches == state), None)
    if backend == "auto":
        return list(words), []
    if backend is None:  # two of three: Transformer Engine prefers what is fused
        return list(words), [f"{shown}: planned with fused attention, as Transformer Engine prefers it"]
    note = f"{shown}: planned as {BACKEND} {backend}, which Megatron 0.19 wants in their place"
    return [*words, BACKEND, backend], [note]


def not_planned(env: Mapping[str, str]) -> list[str]:
    """Variables that a step's time may depend on and a plan does not, in words."""
    return [
        f"{name}={value}: not planned" + (f"; use {_SAID_BY[name]}" if name in _SAID_BY else "")
        for name, value in env.items()
        if OF_STEP.fullmatch(name) and name not in _SWITCHES and not name.startswith(_WITHOUT_TIME)
    ]
