"""What the page takes of visitors and keeps for them: limits, accounts, and the store of their files."""

import os
import time
from dataclasses import replace

import pytest

from sonic.config import PageConfig, UserError
from sonic.page_limits import Limits, Store, accounts, resolve
from sonic.presets import PRESETS


def test_limits_are_strict_for_strangers():
    settings = PRESETS["mini"].settings
    wide = resolve(PageConfig(), share=False, settings=settings)
    strict = resolve(PageConfig(), share=True, settings=settings)
    known = resolve(PageConfig(auth="a:b"), share=True, settings=settings)
    assert wide == known == Limits()
    assert (strict.max_audio_seconds, strict.max_upload_mb, strict.max_batch) == (30, 20, 4)
    assert (strict.max_steps, strict.max_resolution) == (16, 128)  # twice the steps of the model
    assert resolve(PageConfig(max_audio_seconds=45), share=True, settings=settings).max_audio_seconds == 45
    with pytest.raises(UserError, match="max_upload_mb must be a number above 0"):
        PageConfig(max_upload_mb=0)


def test_accounts_come_from_the_flag_or_a_file(tmp_path):
    assert accounts(None) is None
    assert accounts("me:se:cret") == [("me", "se:cret")]
    (tmp_path / "people").write_text("a:1\n\n b:2 \n")
    assert accounts(str(tmp_path / "people")) == [("a", "1"), ("b", "2")]
    (tmp_path / "none").write_text("\n")
    for wrong in ("me", ":x", "me:", str(tmp_path / "none")):
        with pytest.raises(UserError, match="--auth"):
            accounts(wrong)


def test_the_store_forgets_what_is_old_and_what_is_too_much(tmp_path):
    store = Store(tmp_path / "store", replace(Limits(), max_stored_gb=1e-4, keep_hours=1))
    folders = [store.new() for _ in range(4)]
    for age, folder in zip((4000, 3000, 2000, 0), folders, strict=True):
        (folder / "sonic.mp4").write_bytes(bytes(40_000))
        os.utime(folder, (time.time() - age,) * 2)
    assert store.clean()  # the first is older than an hour; the second is one too many
    assert [folder.exists() for folder in folders] == [False, False, True, True]
    assert not store.clean(room=90_000)  # there would be, but what is in use stays
    assert [folder.exists() for folder in folders] == [False, False, False, True]
    assert store.holds(folders[3] / "sonic.mp4") and not store.holds(folders[3])
    (folders[3] / "link").symlink_to("/etc/hostname")
    for outside in ("/etc/hostname", folders[3] / "../../x", folders[3] / "link", "a" * 5000, "/\0", "sonic.mp4", ""):
        assert not store.holds(outside) and not (store.covers(outside)), outside
