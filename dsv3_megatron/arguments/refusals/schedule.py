"""What `--pipeline-schedule` needs, and what cannot be combined with it."""

from argparse import Namespace
from collections.abc import Callable

from dsv3_megatron.arguments.refusals.layout import _dense_model_size, _layout_stages
from dsv3_megatron.arguments.refusals.table import Refusal, has_cuda_graphs
from dsv3_megatron.arguments.surroundings import Surroundings
from dsv3_megatron.dualpipe.arguments import given_options, num_stages, placement_of, table_options
from dsv3_megatron.pipeline.build import ZIGZAG, build_schedule
from dsv3_megatron.pipeline.traits import TRAITS

FEATURE = "Pipeline schedules"
SCHEDULE = "--pipeline-schedule"
DUALPIPE = "--pipeline-schedule dualpipe --pipeline-model-parallel-size 2"
DUALPIPEV = "--pipeline-schedule dualpipev --pipeline-model-parallel-size 2"
ZB1P = "--pipeline-schedule zb1p --pipeline-model-parallel-size 2"


def _on(a: Namespace) -> bool:
    return a.pipeline_schedule != "1f1b"


def _mirrored(a: Namespace) -> bool:
    return TRAITS[a.pipeline_schedule].directions == 2


def _columns(a: Namespace, s: Surroundings) -> int:
    """Ranks beside each other on a pipeline rank."""
    return max(1, s.world_size // a.pipeline_model_parallel_size)


def _expert_block(a: Namespace) -> int:
    return (a.expert_tensor_parallel_size or a.tensor_model_parallel_size) * a.expert_model_parallel_size


def _replicas(a: Namespace, s: Surroundings) -> int:
    """Data-parallel replicas as Megatron counts them; the mirror of a rank is one."""
    return max(1, s.world_size // _dense_model_size(a)) * (2 if _mirrored(a) else 1)


def _microbatches(a: Namespace, s: Surroundings, batch: int | None) -> tuple[int, int]:
    """Microbatches of one direction, and the samples left over."""
    if batch is None:
        return _least(a), 0
    return divmod(batch, a.micro_batch_size * _replicas(a, s))


def _least(a: Namespace) -> int:
    """Fewest microbatches of one direction."""
    traits = TRAITS[a.pipeline_schedule]
    return traits.least_microbatches // traits.directions * a.pipeline_model_parallel_size


def _wrong_batch(a: Namespace, s: Surroundings, batch: int | None) -> bool:
    count, rest = _microbatches(a, s, batch)
    return _on(a) and (count < _least(a) or rest != 0)


def _microbatches_of_step(a: Namespace, s: Surroundings) -> int:
    """Of one pipeline; where the batch does not divide there is another row."""
    return max(1, _microbatches(a, s, a.global_batch_size)[0])


def _wrong_table(a: Namespace, s: Surroundings) -> str:
    """What is wrong with the options that a zigzag is dealt by; building it here is no loss: the run needs it."""
    if (
        a.pipeline_schedule != ZIGZAG
        or not set(given_options(a)) - {"chunks"}
        or a.pipeline_model_parallel_size < 2
    ):
        return ""
    options = table_options(a)
    try:
        build_schedule(ZIGZAG, a.pipeline_model_parallel_size, _microbatches_of_step(a, s), **options)
    except ValueError as error:
        return str(error)
    return ""


def _given(*names: str) -> Callable[[Namespace, Surroundings], bool]:
    return lambda a, s: _on(a) and any(getattr(a, name, None) not in (None, False) for name in names)


def _unsupported(name: str, argument: str, dest: str, reason: str, use: str, words: str) -> Refusal:
    """A row for an option that no schedule of ours takes."""
    return Refusal(
        name,
        FEATURE,
        argument,
        f"{{{dest}}}",
        _given(dest),
        f"{SCHEDULE} {{pipeline_schedule}} {reason}",
        use,
        words,
    )


ROWS = (
    Refusal(
        "schedule_without_pipeline",
        FEATURE,
        "--pipeline-model-parallel-size",
        "{pipeline_model_parallel_size}",
        lambda a, s: _on(a) and a.pipeline_model_parallel_size < 2,
        f"{SCHEDULE} {{pipeline_schedule}} needs a pipeline",
        "2 pipeline ranks or more",
        "--pipeline-schedule zb1p",
    ),
    Refusal(
        "dualpipe_odd_ranks",
        FEATURE,
        "--pipeline-model-parallel-size",
        "{pipeline_model_parallel_size}",
        lambda a, s: (
            _mirrored(a) and a.pipeline_model_parallel_size > 1 and a.pipeline_model_parallel_size % 2 == 1
        ),
        "dualpipe mirrors pipeline rank k with rank P−1−k and needs an even number",
        "an even size, or --pipeline-schedule dualpipev",
        "--pipeline-schedule dualpipe --pipeline-model-parallel-size 3",
    ),
    Refusal(
        "schedule_batch",
        FEATURE,
        "--global-batch-size",
        "{global_batch_size}",
        lambda a, s: _wrong_batch(a, s, a.global_batch_size),
        f"{SCHEDULE} {{pipeline_schedule}} needs a whole number of microbatches on every replica, and at least 2 for "
        "each of its {pipeline_model_parallel_size} pipeline ranks (dualpipe counts both directions together)",
        "a larger --global-batch-size (a multiple of --micro-batch-size × replicas, where dualpipe's mirrored ranks "
        "count as replicas), or fewer data-parallel or pipeline ranks",
        DUALPIPE + " --global-batch-size 8",
    ),
    Refusal(
        "schedule_eval_batch",
        FEATURE,
        "--eval-global-batch-size",
        "{eval_global_batch_size}",
        lambda a, s: _wrong_batch(a, s, a.eval_global_batch_size),
        f"{SCHEDULE} {{pipeline_schedule}} evaluates with the same table, which needs at least 2 microbatches for each "
        "of its {pipeline_model_parallel_size} pipeline ranks on every replica",
        "a larger one, or leave it out",
        DUALPIPE + " --global-batch-size 32 --eval-global-batch-size 8",
    ),
    Refusal(
        "schedule_virtual_stages",
        FEATURE,
        "--num-virtual-stages-per-pipeline-rank / --num-layers-per-virtual-pipeline-stage",
        "{num_virtual_stages_per_pipeline_rank} / {num_layers_per_virtual_pipeline_stage}",
        _given("num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage"),
        f"{SCHEDULE} {{pipeline_schedule}} places the stages itself",
        "neither; --pipeline-model-parallel-layout says which layers a stage has",
        ZB1P + " --num-virtual-stages-per-pipeline-rank 2",
    ),
    Refusal(
        "schedule_stage_sizes",
        FEATURE,
        "--decoder-first-pipeline-num-layers / --decoder-last-pipeline-num-layers / --account-for-*",
        "{decoder_first_pipeline_num_layers} / {decoder_last_pipeline_num_layers}",
        _given(
            "decoder_first_pipeline_num_layers",
            "decoder_last_pipeline_num_layers",
            "account_for_embedding_in_pipeline_split",
            "account_for_loss_in_pipeline_split",
        ),
        f"{SCHEDULE} {{pipeline_schedule}} takes its stages from one notation",
        '--pipeline-model-parallel-layout, e.g. "Ett|ttmL"',
        ZB1P + " --decoder-first-pipeline-num-layers 3",
    ),
    Refusal(
        "schedule_layout_stages",
        FEATURE,
        "--pipeline-model-parallel-layout",
        "{pipeline_model_parallel_layout}",
        lambda a, s: (
            _on(a) and a.pipeline_model_parallel_layout is not None and _layout_stages(a) != num_stages(a)
        ),
        f"{SCHEDULE} {{pipeline_schedule}} on {{pipeline_model_parallel_size}} pipeline ranks has one stage a rank, "
        "dualpipev two, zigzag --pipeline-zigzag-chunks",
        "that many stages, separated by |",
        DUALPIPEV + " --global-batch-size 32 --pipeline-model-parallel-layout Ett|ttmL",
    ),
    Refusal(
        "schedule_layers",
        FEATURE,
        "--num-layers",
        "{num_layers}",
        lambda a, s: _on(a) and a.pipeline_model_parallel_layout is None and a.num_layers < num_stages(a),
        f"{SCHEDULE} {{pipeline_schedule}} on {{pipeline_model_parallel_size}} pipeline ranks has more stages",
        "fewer pipeline ranks, or --pipeline-model-parallel-layout with stages that hold no layer",
        "--pipeline-schedule dualpipev --pipeline-model-parallel-size 4 --global-batch-size 32",
    ),
    Refusal(
        "schedule_max_ctas",
        FEATURE,
        "--pipeline-max-ctas",
        "{pipeline_max_ctas}",
        lambda a, s: _on(a) and a.pipeline_max_ctas < 1,
        "a message's kernel has at least one thread block",
        "1 or 2",
        DUALPIPE + " --global-batch-size 32 --pipeline-max-ctas 0",
    ),
    Refusal(
        "zigzag_options",
        FEATURE,
        "--pipeline-zigzag-chunks / --pipeline-zigzag-memory-cap / --pipeline-zigzag-deferred / --pipeline-costs",
        "{pipeline_zigzag_chunks} / {pipeline_zigzag_memory_cap} / {pipeline_zigzag_deferred} / {pipeline_costs}",
        lambda a, s: a.pipeline_schedule != ZIGZAG and bool(given_options(a)),
        f"{SCHEDULE} {{pipeline_schedule}} deals no weight gradients, so they would be ignored",
        "them with --pipeline-schedule zigzag, or none of them",
        DUALPIPEV + " --global-batch-size 32 --pipeline-zigzag-chunks 4",
    ),
    Refusal(
        "zigzag_table",
        FEATURE,
        "--pipeline-zigzag-memory-cap / --pipeline-zigzag-deferred / --pipeline-costs",
        "{pipeline_zigzag_memory_cap} / {pipeline_zigzag_deferred} / {pipeline_costs}",
        lambda a, s: bool(_wrong_table(a, s)),
        "no table of zigzag can be dealt with them",
        "what it says, or leave them out",
        "--pipeline-schedule zigzag --pipeline-model-parallel-size 2 --pipeline-zigzag-memory-cap 2",
        detail=_wrong_table,
    ),
    Refusal(
        "dualpipe_experts_over_mirror",
        FEATURE,
        "--expert-model-parallel-size",
        "{expert_model_parallel_size}",
        lambda a, s: placement_of(a) is not None and _mirrored(a) and _columns(a, s) % _expert_block(a) != 0,
        "with dualpipe an expert-parallel group must lie on one pipeline rank: its mirror runs the other direction",
        "a size that divides the ranks of a pipeline rank",
        DUALPIPE + " --global-batch-size 32 --expert-model-parallel-size 8",
    ),
    Refusal(
        "schedule_rank_order",
        FEATURE,
        "--use-tp-pp-dp-mapping",
        "",
        lambda a, s: placement_of(a) is not None and a.use_tp_pp_dp_mapping,
        f"{SCHEDULE} {{pipeline_schedule}} numbers the ranks of mirrored pipelines itself",
        "the default order of ranks",
        DUALPIPE + " --global-batch-size 32 --use-tp-pp-dp-mapping",
    ),
    Refusal(
        "schedule_recompute",
        FEATURE,
        "--recompute-granularity / --recompute-modules",
        "{recompute_granularity} / {recompute_modules}",
        lambda a, s: (
            _on(a)
            and (a.recompute_granularity == "full" or bool({"moe", "mlp"} & set(a.recompute_modules or [])))
        ),
        f"{SCHEDULE} {{pipeline_schedule}} runs layers in parts, so they cannot be recomputed whole",
        "--recompute-granularity selective --recompute-modules layernorm mla_up_proj moe_act",
        ZB1P + " --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    Refusal(
        "schedule_mtp_depth",
        FEATURE,
        "--mtp-num-layers",
        "{mtp_num_layers}",
        lambda a, s: _on(a) and (a.mtp_num_layers or 0) > 1 and a.expert_model_parallel_size > 1,
        "Megatron's schedule plans, which the overlapped pairs use, hold one MTP layer",
        "--mtp-num-layers 1 (DeepSeek-V3's)",
        ZB1P + " --mtp-num-layers 2 --expert-model-parallel-size 2",
    ),
    _unsupported(
        "schedule_own_overlap",
        "--overlap-moe-expert-parallel-comm",
        "overlap_moe_expert_parallel_comm",
        "overlaps its pairs by itself",
        "--pipeline-schedule alone",
        ZB1P + " --bf16 --expert-model-parallel-size 2 --overlap-moe-expert-parallel-comm",
    ),
    _unsupported(
        "schedule_own_delay",
        "--delay-wgrad-compute",
        "delay_wgrad_compute",
        "delays weight gradients by itself",
        "--pipeline-schedule alone",
        ZB1P + " --delay-wgrad-compute",
    ),
    _unsupported(
        "schedule_shared_expert_overlap",
        "--moe-shared-expert-overlap",
        "moe_shared_expert_overlap",
        "runs the shared expert inside its nodes",
        "no such option",
        ZB1P + " --moe-shared-expert-overlap",
    ),
    _unsupported(
        "schedule_embedding_wgrad",
        "--defer-embedding-wgrad-compute",
        "defer_embedding_wgrad_compute",
        "decides when weight gradients are computed",
        "no such option",
        ZB1P + " --defer-embedding-wgrad-compute",
    ),
    _unsupported(
        "schedule_offloading",
        "--fine-grained-activation-offloading",
        "fine_grained_activation_offloading",
        "keeps microbatches of two directions, which Megatron's offloading does not tell apart",
        "--recompute-granularity selective",
        ZB1P + " --fine-grained-activation-offloading",
    ),
    Refusal(
        "schedule_cuda_graphs",
        FEATURE,
        "--cuda-graph-impl",
        "{cuda_graph_impl}",
        lambda a, s: _on(a) and has_cuda_graphs(a),
        f"{SCHEDULE} {{pipeline_schedule}} runs layers in parts that no graph of Megatron's holds",
        "--cuda-graph-impl none, the default",
        ZB1P + " --cuda-graph-impl full_iteration",
    ),
    Refusal(
        "profile_without_schedule",
        FEATURE,
        "--profile-pipeline",
        "{profile_pipeline}",
        lambda a, s: a.profile_pipeline is not None and not _on(a),
        "the steps of Megatron's own 1F1B are not recorded",
        "it with --pipeline-schedule zb1p, dualpipe, dualpipev or zigzag",
        "--profile-pipeline 2 --save runs/x",
    ),
    Refusal(
        "profile_step",
        FEATURE,
        "--profile-pipeline",
        "{profile_pipeline}",
        lambda a, s: (
            a.profile_pipeline is not None
            and not 1 <= a.profile_pipeline <= (a.train_iters or a.profile_pipeline)
        ),
        "there is no such step: they count from 1 to --train-iters {train_iters}",
        "a step that is trained",
        ZB1P + " --profile-pipeline 0 --save runs/x",
    ),
    Refusal(
        "profile_folder",
        FEATURE,
        "--profile-pipeline",
        "{profile_pipeline}",
        lambda a, s: (
            a.profile_pipeline is not None and not (a.profile_pipeline_dir or a.tensorboard_dir or a.save)
        ),
        "there is no folder to write the timeline to",
        "--profile-pipeline-dir, --tensorboard-dir or --save",
        ZB1P + " --profile-pipeline 2",
    ),
    Refusal(
        "schedule_optimizer_instances",
        FEATURE,
        "--num-distributed-optimizer-instances",
        "{num_distributed_optimizer_instances}",
        lambda a, s: _on(a) and a.num_distributed_optimizer_instances > 1,
        f"{SCHEDULE} {{pipeline_schedule}} starts the gradient reduction itself, for one optimizer instance",
        "1",
        ZB1P + " --num-distributed-optimizer-instances 2 --use-distributed-optimizer",
    ),
)
