"""Parallel layouts: what has to divide what, and where layers may go."""

from argparse import Namespace

from dsv3_megatron.arguments.refusals.table import Refusal
from dsv3_megatron.arguments.surroundings import Surroundings

TP, PP, CP, EP = "Tensor parallelism", "Pipeline parallelism", "Context parallelism", "Expert parallelism"


def _dense_model_size(a: Namespace) -> int:
    return a.tensor_model_parallel_size * a.pipeline_model_parallel_size * a.context_parallel_size


def _expert_model_size(a: Namespace) -> int:
    expert_tp = a.expert_tensor_parallel_size or a.tensor_model_parallel_size
    return expert_tp * a.expert_model_parallel_size * a.pipeline_model_parallel_size


def _data_parallel_size(a: Namespace, around: Surroundings) -> int:
    return max(1, around.world_size // _dense_model_size(a))


def nvlink_domain_size(a: Namespace, around: Surroundings) -> int:
    """Ranks that reach each other over NVLink: a machine's, where nothing else is given."""
    return a.nvlink_domain_size or around.ranks_per_node


def _domains_too_many(a: Namespace, around: Surroundings) -> int:
    """NVLink domains that the experts of one token can lie in, 0 where the group limit holds or there is none."""
    groups, chosen = a.moe_router_num_groups or 1, a.moe_router_group_topk or 0
    if not 0 < chosen < groups or a.num_experts is None or a.num_experts % a.expert_model_parallel_size:
        return 0
    if around.world_size % _expert_model_size(a):
        return 0  # which has a row of its own
    reached = domains_of_a_token(
        num_groups=groups,
        group_topk=chosen,
        expert_ranks=a.expert_model_parallel_size,
        ranks_per_expert=a.expert_tensor_parallel_size or a.tensor_model_parallel_size,
        domain=nvlink_domain_size(a, around),
        world_size=around.world_size,
    )
    return reached if reached > chosen else 0


def domains_of_a_token(
    *,
    num_groups: int,
    group_topk: int,
    expert_ranks: int,
    ranks_per_expert: int,
    domain: int,
    world_size: int,
) -> int:
    """The most NVLink domains among which `group_topk` of `num_groups` expert groups can lie.

    Experts are dealt out over `expert_ranks` × `ranks_per_expert` neighbouring ranks, group after group, and the next
    such block of ranks holds them again; `domain` neighbouring ranks share NVLink.
    """
    block = expert_ranks * ranks_per_expert
    starts = {start % domain for start in range(0, max(block, min(world_size, block * domain)), block)}
    return max(_most_covered(_spans(start, block, num_groups, domain), group_topk) for start in starts)


def _spans(start: int, block: int, num_groups: int, domain: int) -> list[tuple[int, int]]:
    """First and last domain of each group."""
    first = [start + group * block // num_groups for group in range(num_groups)]
    last = [start + -(-(group + 1) * block // num_groups) - 1 for group in range(num_groups)]
    return [(low // domain, high // domain) for low, high in zip(first, last, strict=True)]


def _most_covered(spans: list[tuple[int, int]], chosen: int) -> int:
    """The most domains that `chosen` of these rising intervals cover together."""
    most: list[list[int]] = []  # most[i][n]: with interval i as the last of n + 1
    for i, (low, high) in enumerate(spans):
        most.append([high - low + 1])
        for n in range(1, min(chosen, i + 1)):
            before = (most[j][n - 1] - max(0, spans[j][1] - low + 1) for j in range(i) if len(most[j]) >= n)
            most[i].append(high - low + 1 + max(before))
    return max(max(counts) for counts in most)


def _uneven_stages(a: Namespace) -> bool:
    if a.pipeline_model_parallel_layout is not None:
        return False
    layers, stages = a.num_layers, a.pipeline_model_parallel_size
    layers += a.account_for_embedding_in_pipeline_split + a.account_for_loss_in_pipeline_split
    for given in (a.decoder_first_pipeline_num_layers, a.decoder_last_pipeline_num_layers):
        if given is not None:
            layers, stages = layers - given, stages - 1
    if stages == 0:
        return layers != 0
    return layers < stages or layers % stages != 0


def _virtual_stages(a: Namespace) -> int | None:
    """Model chunks per rank, None where the arguments do not divide."""
    per_rank = a.num_layers // a.pipeline_model_parallel_size
    if a.num_virtual_stages_per_pipeline_rank is not None:
        return a.num_virtual_stages_per_pipeline_rank
    if a.num_layers_per_virtual_pipeline_stage is not None:
        chunks, rest = divmod(per_rank, a.num_layers_per_virtual_pipeline_stage)
        return None if rest else chunks
    if a.pipeline_model_parallel_layout is not None:
        return (a.pipeline_model_parallel_layout.count("|") + 1) // a.pipeline_model_parallel_size or 1
    return 1


def _uneven_chunks(a: Namespace) -> bool:
    if a.pipeline_model_parallel_layout is not None or _uneven_stages(a):
        return False
    if a.decoder_first_pipeline_num_layers is not None or a.decoder_last_pipeline_num_layers is not None:
        return False
    chunks = _virtual_stages(a)
    layers = a.num_layers + a.account_for_embedding_in_pipeline_split + a.account_for_loss_in_pipeline_split
    return chunks is None or (layers // a.pipeline_model_parallel_size) % chunks != 0


def _interleaved(a: Namespace) -> bool:
    if a.pipeline_model_parallel_layout is not None and not _bad_layout(a):
        return _layout_stages(a) > a.pipeline_model_parallel_size
    return (_virtual_stages(a) or 1) > 1


def _num_microbatches(a: Namespace, around: Surroundings) -> int | None:
    if a.global_batch_size is None:
        return 1
    count, rest = divmod(a.global_batch_size, a.micro_batch_size * _data_parallel_size(a, around))
    return None if rest else count


def _layout_stages(a: Namespace) -> int:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    return PipelineParallelLayerLayout.get_num_stages_from_str(a.pipeline_model_parallel_layout)


def layout_problem(a: Namespace) -> str:
    """What Megatron's own layout class says against the layout string, "" when nothing."""
    if a.pipeline_model_parallel_layout is None:
        return ""
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    try:
        layout = PipelineParallelLayerLayout(a.pipeline_model_parallel_layout, a.pipeline_model_parallel_size)
        layout.validate_layer_layout(a.num_layers, a.mtp_num_layers)
    except (AssertionError, NotImplementedError, ValueError, IndexError) as error:  # IndexError: it is empty
        return str(error)
    return ""


def _bad_layout(a: Namespace) -> bool:
    return bool(layout_problem(a))


ROWS = (
    Refusal(
        "world_size",
        "Layout",
        "--tensor-model-parallel-size × --pipeline-model-parallel-size × --context-parallel-size",
        "{tensor_model_parallel_size} × {pipeline_model_parallel_size} × {context_parallel_size}",
        lambda a, s: s.world_size % _dense_model_size(a) != 0,
        "does not divide the number of ranks, {world_size}",
        "sizes whose product divides {world_size}, or another number of ranks",
        "--pipeline-model-parallel-size 3",
    ),
    Refusal(
        "expert_world_size",
        EP,
        "--expert-model-parallel-size",
        "{expert_model_parallel_size}",
        # Without expert parallelism it is the row above that says it.
        lambda a, s: (
            s.world_size % _expert_model_size(a) != 0
            and (a.expert_model_parallel_size > 1 or s.world_size % _dense_model_size(a) == 0)
        ),
        "expert × expert-tensor × pipeline parallel sizes do not divide the number of ranks, {world_size}",
        "an --expert-model-parallel-size that divides the ranks of a pipeline stage",
        "--pipeline-model-parallel-size 4 --expert-model-parallel-size 4",
    ),
    Refusal(
        "experts_over_ranks",
        EP,
        "--expert-model-parallel-size",
        "{expert_model_parallel_size}",
        lambda a, s: a.num_experts is not None and a.num_experts % a.expert_model_parallel_size != 0,
        "does not divide --num-experts {num_experts}",
        "a divisor of {num_experts}",
        "--num-experts 12 --moe-router-num-groups 4 --expert-model-parallel-size 8",
    ),
    Refusal(
        "groups_over_domains",
        EP,
        "--expert-model-parallel-size",
        "{expert_model_parallel_size}",
        lambda a, s: _domains_too_many(a, s) > 0,
        "puts expert groups across NVLink domains, so that a token can be sent to more of them than the "
        "--moe-router-group-topk {moe_router_group_topk} of --moe-router-num-groups {moe_router_num_groups} groups "
        "that limit it (R§2.1.2)",
        "an --expert-model-parallel-size with each group inside one domain, or --nvlink-domain-size where more ranks "
        "than a machine's share NVLink",
        "--moe-router-num-groups 2 --moe-router-group-topk 1 --expert-model-parallel-size 8",
        Surroundings(world_size=8, ranks_per_node=2),
        detail=lambda a, s: (
            f"{_domains_too_many(a, s)} domains of {nvlink_domain_size(a, s)} ranks can be reached"
        ),
    ),
    Refusal(
        "tp_without_sequence_parallel",
        TP,
        "--tensor-model-parallel-size",
        "{tensor_model_parallel_size}",
        lambda a, s: a.tensor_model_parallel_size > 1 and not a.sequence_parallel,
        "MoE layers under tensor parallelism need sequence parallelism",
        "--sequence-parallel as well",
        "--tensor-model-parallel-size 2",
    ),
    Refusal(
        "sequence_parallel_without_tp",
        TP,
        "--sequence-parallel",
        "",
        lambda a, s: a.sequence_parallel and a.tensor_model_parallel_size == 1,
        "there is one tensor-parallel rank, and Megatron would switch it off with a warning",
        "--tensor-model-parallel-size 2 or more, or leave it out",
        "--sequence-parallel",
    ),
    Refusal(
        "heads_over_tp",
        TP,
        "--num-attention-heads",
        "{num_attention_heads}",
        lambda a, s: a.num_attention_heads % a.tensor_model_parallel_size != 0,
        "is not divisible by --tensor-model-parallel-size {tensor_model_parallel_size}",
        "a multiple of it",
        "--num-attention-heads 6 --tensor-model-parallel-size 4 --sequence-parallel",
    ),
    Refusal(
        "sequence_over_tp_cp",
        "Layout",
        "--seq-length",
        "{seq_length}",
        lambda a, s: (
            a.seq_length
            % (
                a.tensor_model_parallel_size
                * (2 * a.context_parallel_size if a.context_parallel_size > 1 else 1)
            )
            != 0
        ),
        "is not divisible by tensor-parallel size × 2 × context-parallel size "
        "({tensor_model_parallel_size} × 2 × {context_parallel_size})",
        "a multiple of that",
        "--seq-length 30 --context-parallel-size 2",
    ),
    Refusal(
        "hybrid_cp",
        CP,
        "--hybrid-context-parallel",
        "",
        lambda a, s: a.hybrid_context_parallel,
        "the number of context-parallel ranks would change from microbatch to microbatch, which no backend "
        "here was written for",
        "--context-parallel-size alone",
        "--hybrid-context-parallel",
    ),
    Refusal(
        "batch_over_dp",
        "Layout",
        "--global-batch-size",
        "{global_batch_size}",
        lambda a, s: _num_microbatches(a, s) is None,
        "is not divisible by --micro-batch-size {micro_batch_size} × data-parallel size",
        "a multiple of that",
        "--global-batch-size 9",
    ),
    Refusal(
        "layers_over_stages",
        PP,
        "--num-layers",
        "{num_layers}",
        lambda a, s: _uneven_stages(a),
        "cannot be split evenly over --pipeline-model-parallel-size {pipeline_model_parallel_size}",
        "--pipeline-model-parallel-layout, --decoder-first-pipeline-num-layers, "
        "--decoder-last-pipeline-num-layers, or another size",
        "--num-layers 5 --pipeline-model-parallel-size 2",
    ),
    Refusal(
        "layers_over_chunks",
        PP,
        "--num-virtual-stages-per-pipeline-rank / --num-layers-per-virtual-pipeline-stage",
        "{num_virtual_stages_per_pipeline_rank} / {num_layers_per_virtual_pipeline_stage}",
        lambda a, s: _uneven_chunks(a),
        "does not divide the layers of a pipeline stage (--num-layers {num_layers}, "
        "--pipeline-model-parallel-size {pipeline_model_parallel_size})",
        "a divisor, or --pipeline-model-parallel-layout",
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 3",
    ),
    Refusal(
        "two_chunkings",
        PP,
        "--num-virtual-stages-per-pipeline-rank",
        "{num_virtual_stages_per_pipeline_rank}",
        lambda a, s: (
            sum(
                x is not None
                for x in (
                    a.num_virtual_stages_per_pipeline_rank,
                    a.num_layers_per_virtual_pipeline_stage,
                    a.pipeline_model_parallel_layout,
                )
            )
            > 1
        ),
        "only one of it, --num-layers-per-virtual-pipeline-stage and --pipeline-model-parallel-layout can be "
        "given",
        "one of them",
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 "
        "--num-layers-per-virtual-pipeline-stage 1",
    ),
    Refusal(
        "layout_string",
        PP,
        "--pipeline-model-parallel-layout",
        "{pipeline_model_parallel_layout}",
        lambda a, s: _bad_layout(a),
        "does not place --num-layers {num_layers} decoder layers (t), --mtp-num-layers {mtp_num_layers} MTP "
        "layers (m, after them), one embedding (E, first) and one loss (L, last) on a multiple of "
        "--pipeline-model-parallel-size {pipeline_model_parallel_size} stages",
        'stages separated by "|", e.g. "Ett|ttmL" for 4 layers with MTP on 2 stages',
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Ett|tmL",
    ),
    Refusal(
        "chunks_without_pipeline",
        PP,
        "--num-virtual-stages-per-pipeline-rank",
        "{num_virtual_stages_per_pipeline_rank}",
        lambda a, s: (
            a.pipeline_model_parallel_size == 1 and (a.num_virtual_stages_per_pipeline_rank or 1) > 1
        ),
        "the interleaved schedule needs more than one pipeline stage",
        "--pipeline-model-parallel-size 2 or more, or leave it out",
        "--num-virtual-stages-per-pipeline-rank 2",
    ),
    Refusal(
        "microbatches_over_stages",
        PP,
        "--global-batch-size",
        "{global_batch_size}",
        lambda a, s: (
            _interleaved(a)
            and (_num_microbatches(a, s) or a.pipeline_model_parallel_size) < a.pipeline_model_parallel_size
        ),
        "gives fewer microbatches than pipeline stages ({pipeline_model_parallel_size}); the interleaved "
        "schedule needs at least as many",
        "a larger --global-batch-size or no virtual stages",
        "--pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 1 --num-layers 8 "
        "--moe-layer-freq [0]*1+[1]*7 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 4",
    ),
    Refusal(
        "megatron_fsdp",
        "Data parallelism",
        "--use-megatron-fsdp",
        "",
        lambda a, s: a.use_megatron_fsdp,
        "parameters sharded over data-parallel ranks are not supported (DeepSeek-V3 used ZeRO-1, R§3.2)",
        "--use-distributed-optimizer",
        "--use-megatron-fsdp",
    ),
    Refusal(
        "torch_fsdp2",
        "Data parallelism",
        "--use-torch-fsdp2",
        "",
        lambda a, s: a.use_torch_fsdp2,
        "parameters sharded over data-parallel ranks are not supported (DeepSeek-V3 used ZeRO-1, R§3.2)",
        "--use-distributed-optimizer",
        "--use-torch-fsdp2",
    ),
    Refusal(
        "random_init_per_replica",
        "Data parallelism",
        "--data-parallel-random-init",
        "",
        lambda a, s: a.data_parallel_random_init,
        "initial weights depend only on --seed and the parameter's name, so that layouts can be compared",
        "another --seed",
        "--data-parallel-random-init",
    ),
    Refusal(
        "weight_shards",
        TP,
        "--tensor-parallel-num-weight-shards / --expert-tensor-parallel-num-weight-shards",
        "{tensor_parallel_num_weight_shards} / {expert_tensor_parallel_num_weight_shards}",
        lambda a, s: (
            a.tensor_parallel_num_weight_shards not in (None, a.tensor_model_parallel_size)
            or a.expert_tensor_parallel_num_weight_shards not in (None, a.expert_tensor_parallel_size)
        ),
        "weights that are gathered from more ranks than compute with them are not supported",
        "--tensor-model-parallel-size alone",
        "--tensor-parallel-num-weight-shards 2",
    ),
)
