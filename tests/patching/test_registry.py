"""Patches are checked by signature, loud on mismatch, idempotent (rows 12 and 13 of the known failures)."""

import sys
import types

import pytest

from dsv3_megatron import patching
from dsv3_megatron.patching import Patch, PatchMismatch, install_patch, signature_of


@pytest.fixture
def module():
    """A stand-in for a Megatron module, importable as `somewhere`, and `elsewhere` that imported from it."""
    somewhere, elsewhere = types.ModuleType("somewhere"), types.ModuleType("elsewhere")

    def target(a, b: int = 2, *, c=None):
        return a + b

    class Owner:
        def method(self, x):
            return x

        @staticmethod
        def static(x):
            return x

    somewhere.target = elsewhere.target = target
    somewhere.Owner = Owner
    sys.modules.update(somewhere=somewhere, elsewhere=elsewhere)
    yield somewhere
    del sys.modules["somewhere"], sys.modules["elsewhere"]


def plus_one(original):
    return lambda *args, **kwargs: original(*args, **kwargs) + 1


def patch(target="somewhere:target", signature="(a, b=2, *, c=None)", install=plus_one, also=()):
    return Patch("plus_one", target, signature, "test", install, also)


def test_replaces_the_target_and_every_imported_name(module):
    install_patch(patch(also=("elsewhere:target",)))
    assert module.target(1) == 4
    assert sys.modules["elsewhere"].target is module.target


def test_is_idempotent(module):
    for _ in range(3):
        install_patch(patch())
    assert module.target(1) == 4


@pytest.mark.parametrize("name", ["method", "static"])
def test_methods(module, name):
    def install(original):
        if isinstance(original, staticmethod):
            return staticmethod(plus_one(original.__func__))
        return plus_one(original)

    signature = "(self, x)" if name == "method" else "(x)"
    for _ in range(2):
        install_patch(patch(f"somewhere:Owner.{name}", signature, install))
    assert getattr(module.Owner(), name)(1) == 2


def test_another_signature_is_an_error_that_tells_both(module):
    untouched = module.target
    with pytest.raises(PatchMismatch) as error:
        install_patch(patch(signature="(a, b=3)"))
    text = str(error.value)
    assert "somewhere:target" in text and "(a, b=3)" in text and "(a, b=2, *, c=None)" in text
    assert patching.megatron_version() in text
    assert module.target is untouched


def test_a_missing_target_is_an_error(module):
    for target in ("somewhere:gone", "nowhere:target", "somewhere:Owner.gone"):
        with pytest.raises(PatchMismatch, match="plus_one"):
            install_patch(patch(target))


def test_a_name_that_was_rebound_elsewhere_is_an_error(module):
    sys.modules["elsewhere"].target = lambda: None
    untouched = module.target
    with pytest.raises(PatchMismatch, match="elsewhere:target"):
        install_patch(patch(also=("elsewhere:target",)))
    assert module.target is untouched


def test_signature_ignores_annotations_and_addresses():
    def before(a: "int", b=print) -> int:
        return a

    def after(a, b=print):
        return a

    assert signature_of(before) == signature_of(after) == "(a, b=<built-in function print>)"
    assert " at 0x" not in signature_of(lambda f=before: None)


def test_unknown_patch_names_the_known_ones():
    with pytest.raises(ValueError, match="mtp_block_spec"):
        patching.install(["mtp_blok_spec"])


def test_every_patch_matches_the_installed_megatron():
    rows = {row.name: row for row in patching.status()}
    assert "mtp_block_spec" in rows
    assert {name: row.state for name, row in rows.items() if row.state == "mismatch"} == {}
    for known in patching.available():
        assert known.why and rows[known.name].target == known.target


def test_a_changed_megatron_fails_at_start(monkeypatch):
    """As a new Megatron version would: the symbol has one more parameter."""
    import megatron.training.models.gpt as gpt

    monkeypatch.setattr(gpt, "mtp_block_spec", lambda config, spec, vp_stage=None, pp_rank=None: None)
    with pytest.raises(PatchMismatch, match="pp_rank"):
        patching.install(["mtp_block_spec"])
    assert {row.name: row.state for row in patching.status()}["mtp_block_spec"] == "mismatch"
