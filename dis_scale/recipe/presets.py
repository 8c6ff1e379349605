"""Published model sizes by name, for example `DiS-S/2`."""

from typing import Any

from dis_scale.process.errors import UserError, nearest

_SIZES: dict[str, dict[str, Any]] = {
    "DiS-S": {"kind": "dis", "width": 384, "depth": 24},
    "DiS-S368": {"kind": "dis", "width": 368, "depth": 24},
    "DiS-B": {"kind": "dis", "width": 768, "depth": 24},
    "DiS-M": {"kind": "dis", "width": 768, "depth": 48},
    "DiS-L": {"kind": "dis", "width": 1024, "depth": 48},
    "DiS-H": {"kind": "dis", "width": 1536, "depth": 48},
    "DiT-S": {"kind": "dit", "width": 384, "depth": 12, "heads": 6},
    "DiT-B": {"kind": "dit", "width": 768, "depth": 12, "heads": 12},
    "DiT-L": {"kind": "dit", "width": 1024, "depth": 24, "heads": 16},
    "DiT-XL": {"kind": "dit", "width": 1152, "depth": 28, "heads": 16},
}
PRESETS: dict[str, dict[str, Any]] = {
    f"{name}/{patch}": sizes | {"patch": patch} for name, sizes in _SIZES.items() for patch in (2, 4, 8)
} | {
    "DiffuSSM-S": {"kind": "diffussm", "width": 384, "depth": 12},
    "DiffuSSM-L": {"kind": "diffussm", "width": 768, "depth": 24},
    "DiffuSSM-XL": {"kind": "diffussm", "width": 1152, "depth": 29},
}
"""Settings of each published size; DiS-S in the paper's width (384), DiS-S368 in the public code's."""


def preset(name: str) -> dict[str, Any]:
    """Return the settings of a published size; UserError with the nearest name for an unknown one."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}{nearest(name, PRESETS)}; known: {', '.join(PRESETS)}")
    return dict(PRESETS[name])
