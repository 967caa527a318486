"""What a layout costs in memory, time and money, before anyone rents it.

    python -m dsv3_megatron.plan model=v3_671b layout=pp16_ep64 cluster=h800_2048
    python -m dsv3_megatron.plan.search model=v3_671b cluster=h800_2048

The mathematics (`job`, `activations*`, `memory`, `operators`, `stage_times`, `step`, `search`) imports neither
Megatron nor torch; parameter counts come from real modules (`counting`), jobs from the trainer's own configuration
(`from_config`). See docs/plan.md.
"""
