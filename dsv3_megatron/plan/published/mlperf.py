"""MLPerf Training v6.0, DeepSeek-V3 671B: opened once, after the form of the model had been settled.

Seconds between two evaluations, which follow each step (`train_step_time`), mean or median of the last steps of
`result_0.txt`; configurations as submitted. Real text (C4), so DeepSeek's load imbalance. Read in a stored copy of
mlcommons/training_results_v6.0 (Richardyu114/training_results_v6.0 at eabf23a0).
"""

from dataclasses import replace

from dsv3_megatron.plan.calibrated import LOAD_IMBALANCE
from dsv3_megatron.plan.job import Job, Software
from dsv3_megatron.plan.published.run import MXFP8_BRIDGE, STAGES_16, Run, megatron


def _job(gpu: str, num_gpus: int, batch: int) -> Job:
    """PP4 VPP4 EP32, MXFP8 with FP8 attention, overlap, one graph; on GB200 TP2, with the dense MLP recomputed."""
    gb300 = gpu == "gb300"
    return megatron(
        num_gpus=num_gpus, tp=1 if gb300 else 2, pp=4, ep=32, batch=batch, layers=STAGES_16,
        precision=replace(MXFP8_BRIDGE, fp8_attention=True, fp8_head=gb300), recompute=set() if gb300 else {"mlp"},
        dispatcher="hybridep", overlap_pairs=True, communication_sms=32, whole_iteration_graph=True,
        load_imbalance=LOAD_IMBALANCE, software=Software(te=(2, 15), norm_quantises=True, cross_entropy="te"),
    )  # fmt: skip


def _run(gpu: str, num_gpus: int, batch: int, step_s: float, system: str) -> Run:
    tp = "" if gpu == "gb300" else "TP2 "
    name = f"{num_gpus} {gpu.upper()}, MXFP8, {tp}PP4 VPP4 EP32, HybridEP, overlap, one graph, MLPerf"
    assumed = "load imbalance as DeepSeek's; RoCE and InfiniBand alike; 129,280 tokens in the vocabulary"
    return Run(name, gpu, _job(gpu, num_gpus, batch), step_s, "opened", f"MLPerf v6.0, {system}", assumed)


MLPERF: tuple[Run, ...] = (
    _run("gb300", 256, 15360, 38.956, "NVIDIA theia_ngpu256_ngc26.04_nemo"),
    _run("gb300", 512, 15360, 19.927, "NVIDIA theia_ngpu512_ngc26.04_nemo"),
    _run("gb300", 2048, 16384, 6.165, "CoreWeave CoreWeave_GB300_512x4"),
    _run("gb300", 4096, 16384, 3.088, "CoreWeave CoreWeave_GB300_1024x4"),
    _run("gb300", 8192, 16384, 1.728, "CoreWeave CoreWeave_GB300_2048x4"),
    _run("gb200", 256, 15360, 59.232, "Google gb200_nvl72_n64_ngc26.04_nemo"),
    _run("gb200", 512, 15360, 30.723, "NVIDIA tyche-hsg_ngpu512_ngc26.04_nemo"),
    _run("gb200", 2048, 15360, 9.076, "NVIDIA tyche-hsg_ngpu2048_ngc26.04_nemo"),
    _run("gb200", 4096, 16384, 5.438, "NVIDIA tyche-hsg_ngpu4096_ngc26.04_nemo"),
    _run("gb200", 8192, 16384, 3.475, "NVIDIA tyche-hsg_ngpu8192_ngc26.04_nemo"),
)
