"""What recomputation saves, against the sizes of the tensors that are given up."""

import pytest

from dsv3_megatron.conf import compose
from tests.harness import run_distributed


def measure(rank: int, world_size: int) -> list[dict]:
    from dsv3_megatron.studies import recompute_memory as memory

    return memory.measure(["model=tiny"])


def test_saved_bytes_are_those_of_outputs_of_norms_and_up_projections() -> None:
    (rows,) = run_distributed(measure, 1, timeout=300, init=False)
    cfg = compose(["model=tiny"])
    saved = {row["recompute"]: row["saved_per_token"] for row in rows}
    # In bf16: both norms of the layer; query, key and value of all heads.
    norms = 2 * 2 * cfg.hidden_size
    heads = 2 * cfg.num_attention_heads * (2 * (cfg.qk_head_dim + cfg.qk_pos_emb_head_dim) + cfg.v_head_dim)
    assert saved["nothing"] == 0
    # Beside them a number per token, and inputs of what is recomputed.
    assert saved["norms"] == pytest.approx(norms, abs=16)
    assert saved["MLA up-projections"] == pytest.approx(heads, rel=0.1)
    assert saved["both (the presets)"] == pytest.approx(
        saved["norms"] + saved["MLA up-projections"], rel=0.02
    )
    assert all(row["bytes_per_token"] > saved["both (the presets)"] for row in rows)
