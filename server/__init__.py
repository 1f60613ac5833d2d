"""The HTTP face. `sglang serve` will live here; nothing does yet, and no flag pretends otherwise."""
