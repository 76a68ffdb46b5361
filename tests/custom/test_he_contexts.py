from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from custom.cli import main
from custom.config import MOST_ENCRYPTED_NORM
from custom.egress import MOST_PATIENTS
from custom.he_contexts import (
    CLIENT_CONTEXT,
    COEFF_MOD_BIT_SIZES,
    POLY_MODULUS_DEGREE,
    SCALE_BITS,
    SERVER_CONTEXT,
    check_context,
    make_contexts,
    new_context,
    serialized,
    tenseal,
)
from custom.he_packing import FLOOD_STD
from custom.site_sessions import ROOT_FILE
from custom.strict import ConfigError

ts = pytest.importorskip("tenseal")

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def startup(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workspace") / "startup"
    assert [file.name for file in make_contexts(folder)] == [CLIENT_CONTEXT, SERVER_CONTEXT]
    return folder


def load(startup: Path, name: str) -> Any:
    return ts.context_from((startup / name).read_bytes())


def test_only_the_sites_context_can_decrypt(startup: Path) -> None:
    client, server = load(startup, CLIENT_CONTEXT), load(startup, SERVER_CONTEXT)
    check_context(client, CLIENT_CONTEXT, secret_key=True)
    check_context(server, SERVER_CONTEXT, secret_key=False)
    content = ts.ckks_vector(client, [1.0, 2.0]).serialize()
    np.testing.assert_allclose(ts.ckks_vector_from(client, content).decrypt(), [1.0, 2.0], atol=1e-12)
    with pytest.raises(ValueError, match="secret_key"):
        ts.ckks_vector_from(server, content).decrypt()
    with pytest.raises(ValueError, match="Secret"):
        server.secret_key()
    with pytest.raises(ValueError, match="encryption"):
        ts.ckks_vector(server, [1.0])


def test_files_are_for_their_owner_only(startup: Path) -> None:
    for name in (CLIENT_CONTEXT, SERVER_CONTEXT):
        assert (startup / name).stat().st_mode & 0o077 == 0


def test_the_wrong_context_is_refused_with_a_remedy(startup: Path) -> None:
    client, server = load(startup, CLIENT_CONTEXT), load(startup, SERVER_CONTEXT)
    with pytest.raises(ConfigError, match=r"with the sites' secret key.*simulator-keys"):
        check_context(client, SERVER_CONTEXT, secret_key=False)
    with pytest.raises(ConfigError, match=r"without a secret key.*simulator-keys"):
        check_context(server, CLIENT_CONTEXT, secret_key=True)


def test_nvflares_default_scale_is_refused_because_no_noise_fits_under_it() -> None:
    context = ts.context(
        ts.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 40], encryption_type=ts.ENCRYPTION_TYPE.SYMMETRIC
    )
    context.global_scale = 2.0**40
    with pytest.raises(ConfigError, match=f"scale_bits: {SCALE_BITS}"):
        check_context(context, CLIENT_CONTEXT, secret_key=True)


def test_the_noise_over_an_opened_sum_drowns_the_error_of_its_ciphertext() -> None:
    context = new_context()
    zeros = ts.ckks_vector(context, np.zeros(4096))
    total = zeros + ts.ckks_vector(context, np.zeros(4096)) + ts.ckks_vector(context, np.zeros(4096))
    error = np.std(total.decrypt())
    assert 0 < error < FLOOD_STD * 2.0**-50


def test_an_update_at_the_limits_does_not_overflow() -> None:
    """A weight of a million times a norm of 1000, from 500 sites: what custom.config lets pass."""
    context = new_context()
    half = np.full(4096, MOST_PATIENTS * MOST_ENCRYPTED_NORM * 250)
    largest = ts.ckks_vector(context, half) + ts.ckks_vector(context, half)
    np.testing.assert_allclose(largest.decrypt(), 2 * half, rtol=1e-9)
    assert not np.allclose((largest + ts.ckks_vector(context, half)).decrypt(), 3 * half, rtol=1e-2)


def test_contexts_are_kept_unless_forced_and_never_halved(tmp_path: Path) -> None:
    files = make_contexts(tmp_path)
    before = [file.read_bytes() for file in files]
    assert make_contexts(tmp_path) == []
    assert [file.read_bytes() for file in files] == before
    files[0].unlink()
    with pytest.raises(ConfigError, match="--force"):
        make_contexts(tmp_path)
    assert make_contexts(tmp_path, force=True) == files
    assert [file.read_bytes() for file in files] != before
    ours = ts.context_from(files[0].read_bytes())
    content = ts.ckks_vector(ours, [3.0]).serialize()
    assert ts.ckks_vector_from(ts.context_from(files[1].read_bytes()), content).size() == 1


def test_the_command_writes_them_and_then_keeps_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = tmp_path / "simulator_workspace"
    shutil.copytree(REPOSITORY / "simulator_workspace" / "local", workspace / "local")
    assert main(["simulator-keys", str(workspace)]) == 0
    said = capsys.readouterr().out
    assert CLIENT_CONTEXT in said
    assert str(tmp_path / "kits" / "site-1") in said
    assert (workspace / "startup" / SERVER_CONTEXT).is_file()
    root = (tmp_path / "kits" / "server" / ROOT_FILE).read_bytes()
    assert main(["simulator-keys", str(workspace)]) == 0
    assert capsys.readouterr().out.count("kept") == 2
    assert (tmp_path / "kits" / "server" / ROOT_FILE).read_bytes() == root
    (workspace / "startup" / SERVER_CONTEXT).unlink()
    assert main(["simulator-keys", str(workspace)]) == 2
    assert main(["simulator-keys", str(workspace), "--force"]) == 0
    assert (tmp_path / "kits" / "server" / ROOT_FILE).read_bytes() != root


def test_without_tenseal_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tenseal", None)
    with pytest.raises(ConfigError, match=r"fedct\[he\]"):
        tenseal()


def test_what_a_ciphertext_carries_along_has_no_secret_key() -> None:
    """NVFlare's own decomposer would send the context of a vector with it."""
    vector = ts.ckks_vector(new_context(), [1.0])
    assert not ts.context_from(vector.context().serialize()).is_private()
    assert not ts.context_from(serialized(new_context(), secret_key=False)).is_private()


def test_nvflares_provisioning_makes_contexts_that_pass() -> None:
    """With the arguments that the remedy names; HEBuilder adds a relinearisation key, which nothing needs."""
    builder = pytest.importorskip("nvflare.lighter.impl.he").HEBuilder(
        poly_modulus_degree=POLY_MODULUS_DEGREE, coeff_mod_bit_sizes=list(COEFF_MOD_BIT_SIZES), scale_bits=SCALE_BITS
    )
    builder.initialize(None, None)
    for secret in (True, False):
        content = builder.get_serialized_context(is_client=secret)
        check_context(ts.context_from(content), "context", secret_key=secret)
