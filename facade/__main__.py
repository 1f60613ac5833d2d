"""`python -m sgl_diffusion` is `sglang`: what torchrun starts."""

import sys

from sgl_diffusion.cli.main import main

sys.exit(main())
