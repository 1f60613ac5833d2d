"""Generates docs/cli.md: `python -m sgl_diffusion.cli.reference --write`."""

from __future__ import annotations

import sys
from pathlib import Path

from sgl_diffusion.cli.flags import default_text, flag, literal_values
from sgl_diffusion.runtime.args import NunchakuConfig, SamplingParams, ServerArgs, VaeConfig
from sgl_diffusion.runtime.option import aliases, groups, value_type
from sgl_diffusion.server.args import ServeArgs

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"

PREFACE = """# Command line and config reference

Generated from `runtime/args.py` and `server/args.py` by `python -m sgl_diffusion.cli.reference --write`; a test keeps
it true.

`sglang generate` takes the flags of ServerArgs and SamplingParams; `sglang verify` takes them too. `sglang serve` takes
those of ServerArgs and ServeArgs, and what to draw comes with its requests ([server.md](server.md)); `sglang generate`
ignores what is of ServeArgs alone, and says so. A switch may be written `--flag`, `--flag true`, `--flag false` or
`--no-flag`. `--config FILE` reads the same names with underscores from JSON or YAML; flags win over the file, and
`null` means not given. Map-valued options take JSON, `key=value,key=value`, nested keys in a config file, or dots:
`--vae-config.tile-sample-min-height 256`. `--<component>-path P` is `--component-paths.<component> P`. Unknown flags
and keys are errors.
"""


def page() -> str:
    """The whole page as Markdown."""
    parts = [PREFACE]
    for model in (ServerArgs, SamplingParams, ServeArgs):
        parts.append(f"\n## {model.__name__}: {(model.__doc__ or '').lower().rstrip('.')}\n")
        for title, fields in groups(model):
            parts += [f"\n### {title}\n", "| flag | values | default | meaning |", "| --- | --- | --- | --- |"]
            for name, field in fields.items():
                names = ", ".join(f"`{flag(n)}`" for n in (name, *aliases(field)))
                values = " ".join(f"`{v}`" for v in literal_values(field)) or value_type(field).__name__
                parts.append(f"| {names} | {values} | {default_text(field)} | {field.description} |")
    for nested, config in (("vae_config", VaeConfig), ("nunchaku_config", NunchakuConfig)):
        parts += [f"\n## {nested}\n", "| key | values | default | meaning |", "| --- | --- | --- | --- |"]
        for name, field in config.model_fields.items():
            parts.append(f"| `{name}` | {value_type(field).__name__} | {default_text(field)} | {field.description} |")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")
