# SPDX-License-Identifier: Apache-2.0
"""The README of an exported folder: what opens it, and how near it is to the model that it was made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moellava.convert.export.proof import FILE, Certificate
from moellava.model.page import front_matter, opening_lines, origin_lines
from moellava.model.section import Section, section_of

IDENTITY_IN_VLLM = '{"projector_hidden_act": "torch.nn.modules.linear.Identity"}'
"""vLLM has no word for an activation that does nothing but its class; transformers has `linear`."""


def exported_page(config: Any, name: str, certificate: Certificate | None, called: str) -> str:
    """The page.

    Args:
        config: of the folder.
        name: what it was written as.
        certificate: its proof, if there is one.
        called: the model that it was made of.
    """
    section = section_of(config) or Section()
    proof = ["Nothing was compared (`--verify False`)."] if certificate is None else certificate.lines()
    lines = [
        f"# {config.architectures[0]} ({name})",
        "",
        f"Exported by moellava from {called} (conversation template {section.version}). It opens without it:",
        "",
        *opening_lines(config),
        "",
        *(f"    {line}" for line in engine_lines(config.to_dict())),
        "",
        *proof,
        "" if certificate is None else f"\nAll figures: {FILE}",
        "",
        *origin_lines(section),
    ]
    return front_matter(config, ["exported"], library="transformers") + "\n".join(lines).rstrip() + "\n"


def engine_lines(config: Mapping[str, Any], folder: str | Path = ".") -> list[str]:
    """Commands that serve a folder.

    Args:
        config: the content of its config.json.
    """
    code, overrides = "", ""
    if config.get("auto_map"):  # vLLM's own class of that name would not run the code
        code = " --trust-remote-code"
        overrides = " --model-impl transformers"
    elif config.get("projector_hidden_act") == "linear":
        overrides = f" --hf-overrides '{IDENTITY_IN_VLLM}'"
    return [f"vllm serve {folder}{code}{overrides}", f"transformers serve {folder}{code}"]
