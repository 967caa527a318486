"""The doctor: what is needed, what may be absent, and the exit status."""

import json
from dataclasses import replace

import pytest

from dsv3_megatron import doctor, patching
from dsv3_megatron.patching import PatchStatus
from dsv3_megatron.patching.repairs import REPAIRS


def run(capsys, *words):
    status = doctor.main(list(words))
    return status, capsys.readouterr().out


def test_this_machine_is_ready(capsys):
    status, out = run(capsys)
    lines = out.splitlines()
    assert status == 0 and lines[-1] == "ready" and len(lines) < 50
    assert any(line.startswith("patch mtp_block_spec") and "signature matches" in line for line in lines)


def test_folded_lines_hide_nothing(monkeypatch):
    """Every patch is named once, by its own line or its feature's; what does not match is never folded."""
    findings = doctor.patch_findings()
    names = {finding.name.removeprefix("patch ") for finding in findings}
    monkeypatch.setattr(doctor, "SCREEN", 0)  # everything that can be folded is
    for broken in ("mtp_block_spec", "compile_helpers"):
        odd = [
            f if f.name != f"patch {broken}" else replace(f, state="wrong", found="changed") for f in findings
        ]
        shown = doctor.on_one_screen(odd)
        assert len(shown) < len(findings) / 2
        listed = [
            word
            for f in shown
            if f.found.startswith("signatures match: ")
            for word in f.found[18:].split(", ")
        ]
        alone = [f.name.removeprefix("patch ") for f in shown if f.name.startswith("patch ")]
        assert sorted([*listed, *alone]) == sorted(names) and broken in alone
        assert [f.name for f in shown if f.state == "wrong"] == [f"patch {broken}"]
    monkeypatch.setattr(doctor, "SCREEN", 1000)
    assert (
        len(findings) - len(doctor.on_one_screen(findings)) == len(REPAIRS) - 1
    )  # room enough: features stay


def test_json_is_the_last_line(capsys):
    status, out = run(capsys, "--json")
    report = json.loads(out.splitlines()[-1])
    assert report["ok"] is True and status == 0
    found = {row["name"]: row for row in report["findings"]}
    assert found["megatron-core"]["found"].startswith("0.19")
    assert {"host memory", "triton", "torch", "transformer-engine", "apex (NVIDIA)", "DeepEP"} <= set(found)


@pytest.mark.parametrize(
    ("version", "state"), [("0.19.0", "ok"), ("0.19.2", "ok"), ("0.18.2", "wrong"), ("0.20.0rc1", "wrong")]
)
def test_megatron_versions(monkeypatch, version, state):
    monkeypatch.setattr(doctor, "version_of", lambda name: version)
    assert doctor.package_finding(*doctor.NEEDED[1]).state == state


def test_a_missing_package_fails(monkeypatch, capsys):
    real = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "hydra-core" else real(name))
    status, out = run(capsys)
    assert (
        status == 1
        and "pip install 'hydra-core>=1.3'" in out
        and out.splitlines()[-1].startswith("not ready")
    )


def test_a_patch_mismatch_fails(monkeypatch, capsys):
    row = PatchStatus("p", "megatron.core:f", "why", "mismatch", "(a)", "(a, b)")
    monkeypatch.setattr(patching, "status", lambda: [row])
    status, out = run(capsys)
    assert status == 1 and "megatron.core:f: expected (a), found (a, b)" in out


def test_apex_of_pypi_is_not_nvidias(tmp_path):
    assert doctor.apex_finding([]).state == "absent"
    assert doctor.apex_finding([str(tmp_path)]).state == "wrong"
    (tmp_path / "optimizers").mkdir()
    assert doctor.apex_finding([str(tmp_path)]).state == "ok"


def test_transformer_engine_is_needed_on_a_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda module: False)
    assert doctor.transformer_engine_finding(has_gpu=True).state == "missing"
    assert doctor.transformer_engine_finding(has_gpu=False).state == "absent"
