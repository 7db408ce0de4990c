# SPDX-License-Identifier: Apache-2.0
"""Somebody who edits a folder and knows how its manifest is made: only the checks of content are left."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lora_megatron.checkpoint.folder import _manifest_sha256


def reseal(folder: Path) -> None:
    """Make the manifest agree with the files again."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("sha256")
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": _manifest_sha256(manifest)}))
