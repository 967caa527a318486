"""From overrides (`model=tiny train_iters=50`) to one checked configuration."""

from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dsv3_megatron.conf.check import check, model_parallel_size, parallelism, positive, size, world_size
from dsv3_megatron.conf.errors import ConfigError, nearest
from dsv3_megatron.conf.serving import ENTRIES, is_for_serving
from dsv3_megatron.pipeline.placement import layer_layout, layers_per_stage, paid_extra
from dsv3_megatron.pipeline.traits import TRAITS

CONF_DIR = Path(__file__).resolve().parent
# Keys that describe machine, placement and files; everything else at the top level is an argument.
SECTIONS = {
    "cluster": ("name", "gpu", "nodes", "gpus_per_node", "host_memory_gb"),
    "placement": ("last_stage_extra",),
    "corpus": ("dir",),
    "serving": ENTRIES,
}
EXTRA = "placement.last_stage_extra"
# Arguments of which Megatron takes one: the one on the command line displaces what a file sets.
ALTERNATIVES = (
    ("train_tokens", "train_iters", "train_samples"),
    ("lr_decay_iters", "lr_decay_samples"),
    ("lr_wsd_decay_iters", "lr_wsd_decay_samples"),
    ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction"),
    ("global_batch_size", "step_batch_size_schedule"),
)
# Part of `train_tokens`: they go where it goes. A ramp leads to the batch size of its file, not to one that is given.
BY_TOKENS = ("batch_ramp", "last_lr")


def groups() -> dict[str, list[str]]:
    """Configuration groups and their options, `{"model": ["micro", ...], ...}`, from the files."""
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(CONF_DIR.iterdir())
        if folder.is_dir() and any(folder.glob("*.yaml"))
    }


def training_layouts() -> list[str]:
    """Options of the group `layout` that are not for serving."""
    of_file = {name: OmegaConf.load(CONF_DIR / "layout" / f"{name}.yaml") for name in groups()["layout"]}
    return [name for name, layout in of_file.items() if "serving" not in layout]


def compose(overrides: list[str], processes: int | None = None, serving: bool = False) -> DictConfig:
    """The configuration that `overrides` ask for, with every `auto` resolved.

    overrides: Hydra's syntax: `group=option`, `argument=value`, `cluster.nodes=8`. Any Megatron argument may
        be set whether or not a file mentions it; `null` takes away what a file sets. Argument names are
        those of the command line with underscores for hyphens; `to_argv` checks them against Megatron's
        parser.
    processes: how many torchrun has started. None: the cluster's nodes × gpus_per_node.
    serving: layouts for serving are accepted too; who trains or plans training takes none.

    Errors: ConfigError naming the override and the nearest valid one, or the sizes that do not divide.
    """
    parsed = _parse(overrides)
    given = {override.key_or_group for override in parsed}
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3", job_name="dsv3"):
            cfg = hydra_compose("config", overrides=[_hydra_override(o) for o in parsed])
        _refuse_unused_corpus(cfg, given)
        cfg = DictConfig(OmegaConf.to_container(cfg, resolve=True))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    _check_sections(cfg)
    if is_for_serving(cfg) and not serving:
        named = [word for word in overrides if word.startswith("layout=")] or ["serving"]
        raise ConfigError(
            f"{named[-1]}: is a layout for serving; use it with dsv3 dryrun or dsv3 plan serve, or another layout"
        )
    _displace_alternatives(cfg, given)
    _resolve_processes(cfg, processes)
    _resolve_layout(cfg, given)
    check(cfg)
    return cfg


def _parse(overrides: list[str]) -> list[Override]:
    parsed = []
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            raise ConfigError(
                f"{text!r} is no override: write NAME=VALUE, for instance model=tiny or train_iters=50"
            )
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise ConfigError(
                f"cannot read override {text!r}: quote values with special characters, NAME='\"VALUE\"'"
            ) from error
        if override.is_sweep_override():
            raise ConfigError(f"{text!r} asks for several values; a list is written NAME=[a,b]")
        parsed.append(override)
    return parsed


def _hydra_override(override: Override) -> str:
    """The override as Hydra wants it; arguments that no file mentions are added, group options must exist."""
    key, line = override.key_or_group, override.input_line
    assert line is not None
    options = groups().get(key)
    if options is not None:
        value = override.value()
        if value not in options:
            raise ConfigError(
                f"{line}: no such {key}{nearest(str(value), options)} Available: {', '.join(options)}"
            )
        return line.lstrip("+")
    section, _, entry = key.partition(".")
    if entry and section not in SECTIONS:
        raise ConfigError(
            f"{line}: no section {section!r}{nearest(section, SECTIONS)} Available: {', '.join(SECTIONS)}"
        )
    if entry and entry not in SECTIONS[section]:
        entries = SECTIONS[section]
        raise ConfigError(f"{line}: no such entry{nearest(entry, entries)} Available: {', '.join(entries)}")
    return line if override.is_delete() else "++" + line.lstrip("+")


def _check_sections(cfg: DictConfig) -> None:
    for section in SECTIONS:
        if section in cfg and not isinstance(cfg[section], DictConfig):
            raise ConfigError(
                f"{section}={cfg[section]}: set its entries instead, for instance {section}.NAME=VALUE"
            )


def _displace_alternatives(cfg: DictConfig, given: set[str]) -> None:
    for names in ALTERNATIVES:
        if given.intersection(names):
            for name in names:
                if name in cfg and name not in given:
                    cfg[name] = None
    parts = BY_TOKENS if cfg.get("train_tokens") is None else ()
    for name in (*parts, *(("batch_ramp",) if "global_batch_size" in given else ())):
        if name in cfg and name not in given:
            cfg[name] = None


def _resolve_processes(cfg: DictConfig, started: int | None) -> None:
    """Fill `cluster.gpus_per_node: auto`, and hold the cluster against what torchrun has started."""
    cluster = cfg.cluster
    if cluster.gpus_per_node == "auto":
        needed = model_parallel_size(cfg)
        wanted = needed if started is None else started
        if wanted % needed:
            raise ConfigError(
                f"the layout needs {needed} processes or a multiple ({parallelism(cfg)}), but {started}"
                f" started: use torchrun --nproc-per-node {needed}, or another layout"
            )
        if wanted % positive(cfg, "cluster.nodes"):
            raise ConfigError(f"cluster.nodes={cluster.nodes} does not divide {wanted} processes")
        cluster.gpus_per_node = wanted // cluster.nodes
    elif started not in (None, world_size(cfg)):
        raise ConfigError(
            f"cluster={cluster.name} has {cluster.nodes} × {cluster.gpus_per_node} processes, but torchrun"
            f" has started {started}: choose another cluster, or set cluster.nodes and cluster.gpus_per_node"
        )


def _resolve_layout(cfg: DictConfig, given: set[str]) -> None:
    """Fill `pipeline_model_parallel_layout: auto`; one stage needs no layout.

    given: what the overrides set. A placement among them that no layout comes from is an error.
    """
    layout = cfg.get("pipeline_model_parallel_layout")
    if layout != "auto":
        _refuse_unused_placement(
            cfg, given, f"the stages are those of pipeline_model_parallel_layout={layout}"
        )
        return
    virtual = cfg.get("num_virtual_stages_per_pipeline_rank") or 1
    stages = size(cfg, "pipeline") * virtual
    schedule = cfg.get("pipeline_schedule")
    if schedule in TRAITS:
        traits, chunks = TRAITS[schedule], cfg.get("pipeline_zigzag_chunks")
        if traits.chunks_choice and chunks is not None and chunks not in traits.chunks_choice:
            choice = " or ".join(map(str, traits.chunks_choice))
            raise ConfigError(
                f"pipeline_zigzag_chunks={chunks}: {schedule} has other numbers of stages; use {choice}"
            )
        stages = traits.num_stages(stages, chunks)
    if stages == 1:
        _refuse_unused_placement(cfg, given, "the pipeline has one stage")
        cfg.pipeline_model_parallel_layout = None
        return
    counts = layers_per_stage(positive(cfg, "num_layers"), stages, _last_stage_extra(cfg, stages, given))
    cfg.pipeline_model_parallel_layout = layer_layout(counts, cfg.get("mtp_num_layers") or 0)
    cfg.num_virtual_stages_per_pipeline_rank = None  # the layout says it


def _section(cfg: DictConfig, name: str) -> dict[str, Any]:
    return dict(cfg.get(name) or {})


def _last_stage_extra(cfg: DictConfig, stages: int, given: set[str]) -> int:
    """What the last stage counts as holding already. A layout's file may name more than a small model can pay."""
    extra = _section(cfg, "placement").get("last_stage_extra") or 0
    if not isinstance(extra, int) or isinstance(extra, bool) or extra < 0:
        raise ConfigError(f"{EXTRA}={extra}: a whole number of layers is needed, 0 or more")
    paid = paid_extra(cfg.num_layers, stages, extra)
    if EXTRA in given and paid != extra:
        raise ConfigError(
            f"{EXTRA}={extra}: num_layers={cfg.num_layers} over {stages} stages can pay {paid} at most; use that or "
            "less"
        )
    return extra


def _refuse_unused_corpus(cfg: DictConfig, given: set[str]) -> None:
    """cfg: not resolved yet, so that it shows what comes from the corpus."""
    values = OmegaConf.to_container(cfg, resolve=False)
    if "corpus.dir" in given and "${corpus.dir}" not in str(values):
        raise ConfigError("corpus.dir would do nothing: no argument comes from it. Use data=indexed with it")


def _refuse_unused_placement(cfg: DictConfig, given: set[str], because: str) -> None:
    if EXTRA in given:
        value = _section(cfg, "placement").get("last_stage_extra")
        raise ConfigError(
            f"{EXTRA}={value} would do nothing: {because}. Leave it out, or use "
            "pipeline_model_parallel_layout=auto with pipeline_model_parallel_size=2 or more"
        )
